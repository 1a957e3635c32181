"""How the page of `megamm data preview` looks, beside what all pages share (megamm/pages/style.py)."""

STYLE = """
:root { --learnt: #cdeed6; --learnt-line: #137a3b; --special: #e4dcfa; --special-ink: #4a2ba0;
 --image: #d9e8fb; --image-ink: #124a8f; --edge: rgb(0 0 0 / .13) }
@media screen and (prefers-color-scheme: dark) {
:root { --learnt: #1d4a2d; --learnt-line: #6fd695; --special: #3a2f63; --special-ink: #d5c8ff;
 --image: #1f3b60; --image-ink: #bcd9ff; --edge: rgb(255 255 255 / .17) } }
.legend { display: flex; flex-wrap: wrap; gap: .3rem 1.2rem; margin: .8rem 0; padding: .6rem .9rem;
 border: 1px solid var(--line); border-radius: 8px; background: var(--card); font-size: .88rem }
article { background: var(--card); border: 1px solid var(--line); border-radius: 10px; margin: 0 0 18px;
 padding: 14px 18px 18px; scroll-margin-top: 12px }
.top { display: flex; flex-wrap: wrap; gap: .2rem 1rem; align-items: baseline }
.top span { color: var(--soft); font-size: .88rem }
.pictures { display: flex; flex-wrap: wrap; gap: 12px; margin: 12px 0 4px }
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
"""
