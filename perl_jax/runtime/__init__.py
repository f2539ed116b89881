"""What runs on devices and hosts: the mesh, placement, compiled programs, trees, files."""
