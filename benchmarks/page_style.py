"""The report page's stylesheet: phones, wide screens, paper; light and dark.

Every colour is a variable that both themes define, which plots use as well. Printing takes the light ones.
"""

__all__ = ["STYLE"]

LIGHT = """
  --paper: #fdfcf9; --raised: #f5f3ec; --ink: #1f1e1b; --soft: #66625a; --grid: #d9d5ca;
  --good: #1d6f42; --bad: #a8321f; --open: #8a6100; --link: #2a5f9e;
  --original: #55524b; --control: #2f6db3; --window-sinks: #a65f00; --trained: #7d6a00; --student: #b0234b;
  --state-off: #7a4fb0; --window-off: #12756f; --other: #757067;
"""
DARK = """
  --paper: #171614; --raised: #211f1c; --ink: #e9e6df; --soft: #a49f94; --grid: #3c3933;
  --good: #74c793; --bad: #f0907d; --open: #dfb356; --link: #8dbbee;
  --original: #bdb8ac; --control: #7fb2ea; --window-sinks: #e5a44a; --trained: #cfc04d; --student: #f2839f;
  --state-off: #bb9bea; --window-off: #5cc5bd; --other: #8f897d;
"""

STYLE = (
    f"""
:root {{ color-scheme: light dark;{LIGHT}}}
@media screen and (prefers-color-scheme: dark) {{ :root {{{DARK}}} }}
"""
    + """
:root {
  --serif: Charter, "Bitstream Charter", "Iowan Old Style", "Sitka Text", Cambria, Georgia, serif;
  --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif;
  --mono: ui-monospace, "SF Mono", "Cascadia Mono", Menlo, Consolas, monospace;
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 64rem; padding: clamp(1.25rem, 5vw, 3.5rem) clamp(1rem, 4vw, 2.5rem) 4rem;
  background: var(--paper); color: var(--ink); font: 1.0625rem/1.55 var(--serif); }
main:focus { outline: none; }
h1 { font-size: clamp(1.6rem, 1.2rem + 2vw, 2.4rem); line-height: 1.15; letter-spacing: -0.012em; font-weight: 600;
  margin: 0; text-wrap: balance; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.25; font-weight: 600; margin: 0 0 0.9rem; }
h3 { font: 600 0.95rem/1.4 var(--sans); color: var(--soft); margin: 1.25rem 0 0.3rem; }
section { margin-top: 2.75rem; padding-top: 1.25rem; border-top: 1px solid var(--grid); }
p { margin: 0 0 0.9rem; max-width: 42rem; text-wrap: pretty; overflow-wrap: anywhere; }
a { color: var(--link); text-underline-offset: 0.15em; }
.lead { color: var(--soft); margin-top: 0.6rem; overflow-wrap: anywhere; }
.small { font: 0.85rem/1.5 var(--sans); color: var(--soft); }
.brief { font-size: 1.15rem; line-height: 1.5; }
.skip { position: absolute; left: 0.5rem; top: -4rem; padding: 0.5rem 0.9rem; background: var(--raised); z-index: 2; }
.skip:focus { top: 0.5rem; }
nav ul { list-style: none; margin: 1.25rem 0 0; padding: 0; display: flex; flex-wrap: wrap; gap: 0 1.1rem;
  font: 0.9rem/1.4 var(--sans); }
nav a { display: inline-block; padding: 0.3rem 0; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.claims { list-style: none; margin: 0 0 1.25rem; padding: 0; display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr)); }
.claims li { border: 1px solid var(--grid); border-left: 3px solid var(--soft); border-radius: 4px;
  padding: 0.7rem 0.9rem; min-width: 0; }
.claims h3 { margin: 0; }
.claims p { margin: 0.25rem 0 0; }
.claims .verdict { font: 600 0.85rem/1.4 var(--sans); color: var(--soft); }
.claims .value { font-size: 1.35rem; font-weight: 600; white-space: nowrap; }
.claims .basis { font: 0.8rem/1.45 var(--sans); color: var(--soft); }
.claims .good { border-left-color: var(--good); } .claims .good .verdict { color: var(--good); }
.claims .bad { border-left-color: var(--bad); } .claims .bad .verdict { color: var(--bad); }
.claims .unclear { border-left-color: var(--open); } .claims .unclear .verdict { color: var(--open); }
.findings { list-style: none; margin: 0 0 1rem; padding: 0; max-width: 46rem; }
.findings li { display: flex; gap: 0.7rem; padding: 0.35rem 0; position: relative; }
.findings li > span:last-child { text-wrap: pretty; overflow-wrap: anywhere; min-width: 0; }
.mark { flex: none; width: 1.4rem; height: 1.4rem; margin-top: 0.12rem; border-radius: 50%; border: 1px solid;
  font: 600 0.85rem/1.3rem var(--sans); text-align: center; }
.findings .good .mark { color: var(--good); }
.findings .bad .mark { color: var(--bad); }
.findings .open .mark { color: var(--open); }
.note { color: var(--soft); }
.spoken { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
/* Positioned, so that what is spoken only stays inside and does not widen the page. */
.scroll { overflow-x: auto; position: relative; }
table { border-collapse: collapse; font: 0.875rem/1.4 var(--sans); font-variant-numeric: tabular-nums lining-nums;
  min-width: min(100%, 36rem); }
th, td { padding: 0.42rem 0 0.42rem 1.25rem; text-align: right; white-space: nowrap; }
thead th { font-weight: 500; color: var(--soft); border-bottom: 1px solid var(--ink); vertical-align: bottom;
  white-space: normal; min-width: 4.2rem; }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
th:first-child { text-align: left; padding-left: 0; padding-right: 0.5rem; position: sticky; left: 0; z-index: 1;
  background: var(--paper); font-weight: 500; }
.strong > *, .strong > th:first-child { font-weight: 700; }
td.good { color: var(--good); }
td.bad { color: var(--bad); }
/* Hangs into the next column's padding, so that digits stay below digits. */
.sign { display: inline-block; width: 1.1em; margin-right: -1.1em; text-align: center; font-weight: 400; }
td:last-child, th:last-child { padding-right: 1.2em; }
.plots { display: grid; margin: 1.25rem 0; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr));
  gap: 1.5rem 2rem; }
figure { margin: 0 0 1rem; min-width: 0; }
.tabular { margin: 1.25rem 0 1.5rem; }
figure > svg { display: block; width: 100%; height: auto; max-width: 30rem; }
figcaption { font: 0.85rem/1.45 var(--sans); color: var(--soft); max-width: 42rem; margin: 0.3rem 0; }
.plots figcaption { max-width: 30rem; }
.save { white-space: nowrap; }
dl { font: 0.875rem/1.5 var(--sans); margin: 0 0 1.25rem; }
dl div { display: grid; grid-template-columns: 9rem minmax(0, 1fr); gap: 0 1rem; padding: 0.3rem 0;
  border-bottom: 1px solid var(--grid); }
dt { color: var(--soft); }
dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
details { margin: 0 0 1rem; }
summary { cursor: pointer; font: 0.9rem/1.5 var(--sans); padding: 0.2rem 0; }
.data { margin-bottom: 0; }
.data summary { color: var(--soft); }
pre { font: 0.8rem/1.5 var(--mono); background: var(--raised); padding: 0.9rem 1rem; border-radius: 4px;
  margin: 0.4rem 0 0; }
@media (max-width: 30rem) {
  body { font-size: 1rem; }
  th, td { padding-left: 0.9rem; }
  /* Long row titles would leave no room to scroll under. */
  th:first-child { max-width: 7.5rem; white-space: normal; }
  dl div { grid-template-columns: minmax(0, 1fr); }
}
@media screen and (min-width: 76rem) {
  body { max-width: 78rem; display: grid; grid-template-columns: 10.5rem minmax(0, 1fr); column-gap: 3rem; }
  header { grid-column: 2; }
  nav { grid-column: 1; grid-row: 2; }
  nav ul { flex-direction: column; position: sticky; top: 1.5rem; margin-top: 2.75rem; padding-top: 1.25rem; }
  main { grid-column: 2; }
}
@page { margin: 16mm 14mm; }
@media print {
  :root { color-scheme: light; --paper: #fff; }
  body { font-size: 10pt; padding: 0; max-width: none; }
  nav, .skip, .save, .data { display: none; }
  h1, h2, h3, .tabular figcaption { break-after: avoid; }
  dl, .scroll { break-before: avoid; }
  dl { font-size: 8.5pt; }
  .claims { grid-template-columns: repeat(3, 1fr); gap: 0.6rem; }
  .claims li { padding: 0.4rem 0.6rem; }
  section { margin-top: 1.5rem; padding-top: 0.8rem; }
  tr, li, .plots figure, dl div { break-inside: avoid; }
  thead { display: table-header-group; }
  /* What scrolls on a screen has to fit on paper. */
  .scroll { overflow: visible; }
  table { font-size: 7.5pt; }
  th, td { padding: 0.25rem 0 0.25rem 0.6rem; white-space: normal; }
  thead th { min-width: 0; }
  th:first-child { position: static; background: none; }
  .plots { grid-template-columns: 1fr 1fr; }
  pre { white-space: pre-wrap; background: none; padding: 0; overflow-wrap: anywhere; }
  details::details-content { content-visibility: visible; block-size: auto; }
}
"""
)
