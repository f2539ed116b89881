# shellcheck shell=bash
# What the scripts of this folder share: messages, options, quoting, commands that --dry-run prints.
# It is sourced; a script sets `script` (its name in messages) and `dry_run` (0 or 1).
script=${script:-launch} dry_run=${dry_run:-0}

# The user's error: one sentence, status 2.
die() {
  printf '%s: %s\n' "$script" "$1" >&2
  exit 2
}

note() {
  printf '%s: %s\n' "$script" "$1" >&2
}

# A script's opening comment is its help.
help_of() {
  sed -n -e '1d' -e '/^#/!q' -e 's/^# \{0,1\}//p' "$1"
}

# An option's value, the second of the words left: `value "$@"`.
value() {
  [[ $# -ge 2 && -n $2 && $2 != -- ]] || die "$1 needs a value."
  printf '%s' "$2"
}

# Whole numbers only: `whole NAME VALUE LEAST`.
whole() {
  { [[ $2 =~ ^[0-9]{1,9}$ ]] && ((10#$2 >= $3)); } || die "$1 is '$2'; it must be a whole number, at least $3."
}

# Words as one line of shell, with POSIX quotes only.
quote() {
  local word line='' escaped="'\\''"
  for word; do
    case $word in
      '' | *[!a-zA-Z0-9_@%+=:,./-]*) word="'${word//"'"/"$escaped"}'" ;;
    esac
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command, or prints it.
run() {
  if ((dry_run)); then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# A tool must be there, unless nothing is run: `need TOOL WHERE_IT_IS_FROM`.
need() {
  ((dry_run)) || command -v "$1" >/dev/null || die "$1 is not installed; $2."
}

# The command after --, and that it writes where every host can read.
check_command() {
  [[ $# -gt 0 ]] || die "there is no command to run; give it after --, as in: -- perl-jax rl --run FOLDER ..."
}

# Hosts share nothing but buckets and what is mounted on all of them.
check_shared_run() {
  local word before=''
  for word; do
    case $word in
      --run=*) before='--run' word=${word#--run=} ;;
    esac
    if [[ $before == --run ]]; then
      case $word in
        gs://[!/]*/?* | /*) ;;
        *) die "--run is $word; it must be in a bucket (gs://BUCKET/FOLDER), or an absolute path in a folder that is mounted on every host." ;;
      esac
    fi
    before=$word
  done
}

# The variables of --env: each must be a name, without a value, which would be seen in lists of processes and in logs.
check_names() {
  local variable
  for variable; do
    [[ $variable =~ ^[a-zA-Z_][a-zA-Z0-9_]*$ ]] || die "--env takes the name of an environment variable without its value, as in --env HF_TOKEN."
  done
}

# ... and each must be set where the script is started.
check_variables() {
  local variable
  check_names "$@"
  for variable; do
    [[ -n ${!variable-} ]] || die "$variable is not set here, and --env $variable asks for it; export it first."
  done
}

# Each line that arrives, with a prefix.
prefixed() {
  local line
  while IFS= read -r line || [[ -n $line ]]; do
    printf '%s%s\n' "$1" "$line"
  done
}

# A status in words: signals by their name.
status_in_words() {
  if (($1 > 128 && $1 < 160)); then
    printf 'status %d (SIG%s)' "$1" "$(kill -l $(($1 - 128)))"
  else
    printf 'status %d' "$1"
  fi
}
