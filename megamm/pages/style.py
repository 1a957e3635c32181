"""How all pages look: light or dark as the reader's system is."""

BASE = """
:root { color-scheme: light dark; --paper: #f6f7f9; --card: #fff; --ink: #1b2028; --soft: #566070;
 --line: #d8dde4; --link: #124a8f; --bad: #fde3df; --bad-ink: #a31f12; --width: 1080px }
@media screen and (prefers-color-scheme: dark) {
:root { --paper: #12151a; --card: #1b1f26; --ink: #e8ebf0; --soft: #a3adbb; --line: #353c47; --link: #bcd9ff;
 --bad: #55221c; --bad-ink: #ffc1b8 } }
* { box-sizing: border-box }
body { margin: 0; background: var(--paper); color: var(--ink);
 font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif }
main, header { max-width: var(--width); margin: 0 auto; padding: 0 20px }
header { padding-top: 28px }
h1 { font-size: 1.45rem; margin: 0 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.05rem; margin: 0 }
a { color: var(--link) }
a:focus-visible, summary:focus-visible { outline: 3px solid var(--link); outline-offset: 2px }
.facts { color: var(--soft); margin: .2rem 0 .8rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: .6rem 0 }
dt { color: var(--soft) } dd { margin: 0; overflow-wrap: anywhere }
summary { cursor: pointer; color: var(--soft) }
nav { display: flex; flex-wrap: wrap; gap: .2rem .8rem; margin: .8rem 0 }
figure { margin: 0; width: 200px }
figure img { display: block; max-width: 200px; max-height: 200px; border-radius: 5px;
 border: 1px solid var(--line) }
figcaption { font-size: .76rem; color: var(--soft); overflow-wrap: anywhere; line-height: 1.35;
 margin-top: 3px }
.bad { background: var(--bad); color: var(--bad-ink); border-radius: 5px; padding: 10px; font-size: .84rem;
 overflow-wrap: anywhere }
.note { color: var(--soft); font-size: .84rem }
"""
