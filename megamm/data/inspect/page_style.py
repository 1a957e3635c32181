"""How the page of `megamm data preview` looks: light or dark as the reader's system is."""

STYLE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1b2028; --soft: #566070;
 --line: #d8dde4; --learnt: #cdeed6; --learnt-line: #137a3b; --special: #e4dcfa; --special-ink: #4a2ba0;
 --image: #d9e8fb; --image-ink: #124a8f; --bad: #fde3df; --bad-ink: #a31f12; --edge: rgb(0 0 0 / .13); }
@media (prefers-color-scheme: dark) {
:root { --paper: #12151a; --card: #1b1f26; --ink: #e8ebf0; --soft: #a3adbb; --line: #353c47;
 --learnt: #1d4a2d; --learnt-line: #6fd695; --special: #3a2f63; --special-ink: #d5c8ff;
 --image: #1f3b60; --image-ink: #bcd9ff; --bad: #55221c; --bad-ink: #ffc1b8;
 --edge: rgb(255 255 255 / .17); } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
 font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
main, header { max-width: 1080px; margin: 0 auto; padding: 0 20px }
header { padding-top: 28px }
h1 { font-size: 1.45rem; margin: 0 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.05rem; margin: 0 }
a { color: var(--image-ink) }
a:focus-visible, summary:focus-visible { outline: 3px solid var(--image-ink); outline-offset: 2px }
.facts { color: var(--soft); margin: .2rem 0 .8rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .2rem .8rem; margin: .8rem 0 }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .8rem 0; padding: .6rem .9rem;
 border: 1px solid var(--line); border-radius: 8px; background: var(--card); font-size: .88rem }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 18px;
 padding: 14px 18px 18px; scroll-margin-top: 12px }
.top { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline }
.top span { color: var(--soft); font-size: .88rem }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; margin: 12px 0 4px }
figure { margin: 0; width: 200px }
figure img { display: block; max-width: 200px; max-height: 200px; border-radius: 5px;
 border: 1px solid var(--line) }
figcaption { font-size: .76rem; color: var(--soft); overflow-wrap: anywhere; line-height: 1.35;
 margin-top: 3px }
.bad { background: var(--bad); color: var(--bad-ink); border-radius: 5px; padding: 10px; font-size: .84rem;
 overflow-wrap: anywhere }
.lost img { opacity: .35 }
.text { font: 14px/1.95 ui-monospace, "Cascadia Mono", Menlo, "DejaVu Sans Mono", monospace;
 white-space: pre-wrap; overflow-wrap: anywhere; margin: 12px 0 0 }
.t { position: relative; box-shadow: inset 1px 0 var(--edge); padding: 2px 0 }
.l { background: var(--learnt); border-bottom: 2px solid var(--learnt-line) }
.s { background: var(--special); color: var(--special-ink) }
.i { background: var(--image); color: var(--image-ink); font-weight: 600 }
.l.s { border-bottom: 2px solid var(--learnt-line) }
.x { background: var(--bad); color: var(--bad-ink) }
.t:hover { outline: 1px solid var(--ink) }
.t:hover::after { content: attr(data-i); position: absolute; left: 0; top: 100%; z-index: 2; white-space: pre;
 background: var(--ink); color: var(--card); font-size: 12px; line-height: 1.4; padding: 3px 8px;
 border-radius: 4px; font-weight: 400; pointer-events: none }
.cut { display: block; margin: 8px 0; border-top: 2px dashed var(--bad-ink); color: var(--bad-ink);
 font: 600 .8rem/1.6 system-ui, sans-serif }
.gone { opacity: .72 }
.note { color: var(--soft); font-size: .84rem }
"""
