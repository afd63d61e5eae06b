"""The look of pages, light or dark as the reader's system is."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f7f8f9; --edge: #dfe3e8; --text: #1c2229;
  --soft: #5a6572; --link: #0b63a8; --neutral: #808a95; --grid: #e3e7eb;
  --warn: #fff3d6; --good: #1a7f4b; --busy: #0b63a8; --bad: #a65300;
  --c0: #0b6fb8; --c1: #d1570a; --c2: #0a8a66; --c3: #b5488f;
  --c4: #8a6d00; --c5: #5b4bc4; --c6: #2b95a8; --c7: #6b6b6b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14181d; --card: #1c2229; --edge: #333c46; --text: #e6eaee;
    --soft: #a3aeba; --link: #6db7f2; --neutral: #8d98a4; --grid: #303840;
    --warn: #4a3a12; --good: #4cc98a; --busy: #6db7f2; --bad: #f2a65a;
    --c0: #5db4f0; --c1: #ff9248; --c2: #3ccf9e; --c3: #ee8dc9;
    --c4: #e0c040; --c5: #a99bff; --c6: #7fdcf0; --c7: #b5b5b5;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem clamp(.8rem, 2.5vw, 2.5rem) 3rem;
  max-width: 90rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif;
  overflow-wrap: anywhere;
}
h1 { font-size: clamp(1.4rem, 4vw, 2rem); line-height: 1.2; margin: .4em 0; }
h2 { font-size: 1.3rem; margin: 2.2em 0 .2em; padding-top: .6em;
  border-top: 1px solid var(--edge); }
h3 { font-size: 1rem; margin: 0 0 .3em; }
p { margin: .3em 0 .8em; max-width: 50rem; }
a { color: var(--link); }
ul { padding-left: 1.2rem; }
code, pre { font: .875em ui-monospace, "Liberation Mono", monospace; }
pre { margin: 0; }
.soft { color: var(--soft); }
.state { font-weight: 600; }
.finished { color: var(--good); } .running { color: var(--busy); }
.stopped, .begun { color: var(--bad); }
.warn { background: var(--warn); padding: .6em .9em; border-radius: 6px;
  max-width: none; }
.facts, .tiles { display: grid; gap: .7rem 1.5rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); }
@media (min-width: 50rem) { .facts {
  grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); } }
:is(.facts, .tiles) dt { color: var(--soft); font-size: .85rem; }
:is(.facts, .tiles) dd { margin: 0; }
.tiles { gap: .7rem; }
.tiles div { padding: .5rem .9rem; background: var(--card);
  border: 1px solid var(--edge); border-radius: 8px; }
.tiles dd { font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tiles small { display: block; font-size: .85rem; color: var(--soft); }
.grid { display: grid; gap: 1rem; margin-bottom: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); }
figure { margin: 0; padding: .8rem .9rem; background: var(--card);
  border: 1px solid var(--edge); border-radius: 8px; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figure svg text { font-family: inherit !important; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .4rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; padding: 0;
  margin: .2rem 0 .4rem; list-style: none; font-size: .9rem; }
svg.chip { display: inline-block; width: 30px; height: 12px;
  vertical-align: -1px; margin-right: .4em; }
.scroll { overflow-x: auto; margin: .6rem 0 1rem; max-width: 100%; }
table { border-collapse: collapse; font-size: .92rem; overflow-wrap: normal; }
th, td { padding: .3rem 1rem .3rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--edge); white-space: nowrap; }
.numbers :is(th, td) + :is(th, td) { text-align: right;
  font-variant-numeric: tabular-nums; }
.texts td { white-space: normal; min-width: 6.5rem; max-width: 24rem;
  overflow-wrap: anywhere; }
:is(th, td):first-child { position: sticky; left: 0; max-width: 45vw;
  min-width: min(8.5rem, 36vw);
  background: var(--page); white-space: normal; overflow-wrap: anywhere; }
details { margin: .8rem 0; }
summary { cursor: pointer; color: var(--link); }
dl.words dt { font-weight: 600; }
dl.words dd { margin: 0 0 .6em; max-width: 50rem; }
"""
