"""The page's style sheet: light, system fonts, one column on a phone, plain on paper."""

CSS = """
:root { color-scheme: light; --ink: #111827; --soft: #4b5563; --line: #e5e7eb; --wash: #f8fafc;
  --accent: #0b5c8f; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink); line-height: 1.55;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  -webkit-text-size-adjust: 100%; }
main { max-width: 1080px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .35rem; letter-spacing: -.01em; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 2px solid var(--line); }
p { margin: .5rem 0; overflow-wrap: anywhere; }
section > p { max-width: 46rem; }
.facts, .note, figcaption, .caption { color: var(--soft); font-size: .9rem; }
.facts { margin: 0 0 1rem; }
.lead { font-size: 1.08rem; max-width: 50rem; margin-top: 1rem; }
.table { margin: .75rem 0 1.25rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem;
  font-variant-numeric: tabular-nums; }
.caption { margin: .5rem 0 0; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: left;
  vertical-align: top; }
thead th { border-bottom: 2px solid #9ca3af; vertical-align: bottom; }
tbody th { font-weight: 400; min-width: 10rem; }
th:first-child, td:first-child { padding-left: 0; }
tbody th[scope=row], thead th:first-child { position: sticky; left: 0; background: #fff; }
.number { text-align: right; white-space: nowrap; }
thead .number { white-space: normal; }
.stacked th, .stacked td { padding-left: .5rem; padding-right: .5rem; }
.ci { color: var(--soft); }
.stacked .ci { display: block; font-size: .85em; }
.missing { color: #6b7280; font-style: italic; }
tr.group th { font-weight: 650; padding-top: 1.1rem; color: var(--accent); }
.grid { display: grid; gap: 1.25rem 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.grid > figure { max-width: 560px; }
figure { margin: .5rem 0; break-inside: avoid; }
figure img { display: block; width: 100%; height: auto; }
figcaption:empty { display: none; }
.narrow { max-width: 34rem; }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: .86rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.sample { border: 1px solid var(--line); border-radius: 8px; margin: 1rem 0; overflow: hidden;
  break-inside: avoid; }
.prompt { background: var(--wash); padding: .7rem .9rem; border-bottom: 1px solid var(--line); }
.answers { display: grid; grid-template-columns: 1fr 1fr; gap: 1px; background: var(--line); }
.answer { background: #fff; padding: .6rem .9rem .8rem; min-width: 0; }
.answer:last-child:nth-child(odd) { grid-column: 1 / -1; }
.answers.three { grid-template-columns: 1fr 1fr 1fr; }
.answers.three .answer:last-child:nth-child(odd) { grid-column: auto; }
h3 { font-size: 1.02rem; margin: 1.5rem 0 .25rem; }
.who { margin: 0 0 .3rem; font-size: .85rem; display: flex; flex-wrap: wrap; gap: 0 .6rem;
  justify-content: space-between; }
.who span { color: var(--soft); font-variant-numeric: tabular-nums; }
.command, details pre { background: var(--wash); border: 1px solid var(--line); border-radius: 6px;
  padding: .7rem .9rem; }
details { margin: .5rem 0; }
summary { cursor: pointer; color: var(--accent); }
details pre { margin-top: .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.25rem;
  font-size: .93rem; }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; }
@media (max-width: 640px) {
  main { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.5rem; }
  .number .ci { display: block; font-size: .85em; }
  .answers, .answers.three { grid-template-columns: 1fr; }
  th, td { padding: .4rem .35rem; }
  table { font-size: .85rem; }
  tbody th { min-width: 6rem; }
  dl { grid-template-columns: 1fr; gap: 0; }
  dd { margin-bottom: .5rem; }
}
@media print {
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  h2 { break-after: avoid; }
  tr { break-inside: avoid; }
  .scroll { overflow: visible; }
}
"""
