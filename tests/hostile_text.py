"""Text that tries to be more than text, at every border where text of others leaves the stack."""

NASTY = {
    "markup": "[/x] [bold]b[/] [link=https://x.invalid]l[/link] :smile:",
    "colour": "\x1b[31mred\x1b[0m \x1b[2J",
    "link": "\x1b]8;;https://x.invalid\x07click\x1b]8;;\x07",
    "clipboard": "\x1b]52;c;cm0=\x07",
    "c1": "\x9b31m\x9d52;c;x\x9c\x84\x85",
    "over": "good\rbad\x08\x08\x7f\x0b\x0c",
    "bidi": "a\u202eb\u2066c\u2069\u200f\u061c",
    "unseen": "a\u200bb\ufeffc\u00add\u2060e\U000e0041",
    "lines": "a\u2028b\u2029c\x00d",
    "surrogate": "a\udcffb\ud800c",
    "script": "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "attribute": "\" onclick=alert(1) x=' autofocus onfocus=alert(1) '",
    "address": "[l](javascript:alert(1)) <javascript:alert(1)> ![i](//x.invalid/i)",
    "table": "| a | b |\n| --- | --- |\n| `c` **d** | _e_ ~~f~~ |",
    "block": 'x\n\n# h\n\n- i\n\n??? note "n"\n    t\n\n```\nc\n```\n~~~~~~\n<b>d</b>\n',
    "braces": "{: onclick=alert(1) } {{ 7 * 7 }} {% raw %} ${x} &lt;b&gt;",
    "yaml": "x\n---\ntitle: y\n...\n- a: !!python/object:os.system x",
}
# Those that UTF-8 can hold, as in records and on pages.
IN_FILES = {name: text for name, text in NASTY.items() if name != "surrogate"}
