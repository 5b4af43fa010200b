// Markdown as nodes of the page, never as markup: a model's text is only ever a text node or an attribute of a link
// that was checked.  Paragraphs, headings, lists, quotes, rules, code, bold, italics and links to http(s).
const markdown = (() => {
  const element = (name, ...children) => {
    const made = document.createElement(name);
    made.append(...children);
    return made;
  };

  const link = (words, target) => {
    const made = element("a", ...inline(words));
    made.href = target;
    made.target = "_blank";
    made.rel = "noopener noreferrer";
    return made;
  };

  // in order: an escaped mark, code, bold, italics, a link; what fits none stays text
  const SPANS = [
    [/^\\([\\`*_{}\[\]()#+\-.!>~|])/, (m) => m[1]],
    [/^(`+)([^`]|[^`][^]*?[^`])\1(?!`)/, (m) => element("code", m[2])],
    [/^\*\*(?=\S)([^]*?\S)\*\*/, (m) => element("strong", ...inline(m[1]))],
    [/^__(?=\S)([^]*?\S)__(?!\w)/, (m) => element("strong", ...inline(m[1]))],
    [/^\*(?=[^\s*])([^*]*[^\s*])\*(?!\*)/, (m) => element("em", ...inline(m[1]))],
    [/^_(?=[^\s_])([^_]*[^\s_])_(?!\w)/, (m) => element("em", ...inline(m[1]))],
    [/^\[([^\[\]]+)\]\((https?:\/\/[^\s()<>"]+)\)/i, (m) => link(m[1], m[2])],
  ];

  const LONGEST = 20000; // characters of a paragraph: a longer one is no prose, and stays as it is

  function inline(text) {
    if (text.length > LONGEST) return [text];
    const out = [];
    let plain = "";
    while (text) {
      const before = plain.slice(-1);
      let found = null;
      if ("\\`*_[".includes(text[0]) && !(text[0] === "_" && /\w/.test(before))) {
        for (const [pattern, make] of SPANS) {
          const match = pattern.exec(text);
          if (match) { found = [match, make]; break; }
        }
      }
      if (found) {
        const made = found[1](found[0]);
        if (typeof made === "string") plain += made;
        else {
          if (plain) out.push(plain);
          plain = "";
          out.push(made);
        }
        text = text.slice(found[0][0].length);
      } else {
        plain += text[0];
        text = text.slice(1);
      }
    }
    if (plain) out.push(plain);
    return out;
  }

  const FENCE = /^ {0,3}(```+|~~~+)\s*([^`]*)$/, HEAD = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/, RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
  const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/, QUOTE = /^ {0,3}> ?(.*)$/;
  const opens = (line) => FENCE.test(line) || HEAD.test(line) || RULE.test(line) || ITEM.test(line) || QUOTE.test(line);
  const DEEPEST = 6; // of lists and quotes inside one another: the text is a stranger's

  function list(lines, at, depth) {
    const first = ITEM.exec(lines[at]), base = first[1].length, numbered = /\d/.test(first[2]);
    const made = element(numbered ? "ol" : "ul");
    if (numbered) made.start = parseInt(first[2], 10);
    while (at < lines.length) {
      const item = ITEM.exec(lines[at]);
      if (!item || item[1].length !== base || /\d/.test(item[2]) !== numbered || RULE.test(lines[at])) break;
      const inner = [item[3]];
      for (at += 1; at < lines.length; at += 1) {
        const line = lines[at], next = ITEM.exec(line);
        if (next ? next[1].length <= base : line.trim() ? !/^\s{2,}/.test(line) : !/^\s{2,}\S/.test(lines[at + 1] || "")) break;
        inner.push(line.slice(Math.min(base + 2, line.length - line.trimStart().length)));
      }
      made.append(element("li", ...blocks(inner, depth + 1)));
      while (at < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1] || "")) at += 1;
    }
    return [made, at];
  }

  function blocks(lines, depth) {
    const out = [];
    let at = 0;
    while (at < lines.length) {
      const line = lines[at], fence = FENCE.exec(line), head = HEAD.exec(line);
      if (!line.trim()) {
        at += 1;
      } else if (fence) {
        const code = [];
        for (at += 1; at < lines.length && !lines[at].trim().startsWith(fence[1]); at += 1) code.push(lines[at]);
        at += 1;
        out.push(element("pre", element("code", code.join("\n"))));
      } else if (head) {
        out.push(element("h" + Math.min(6, head[1].length + 2), ...inline(head[2])));
        at += 1;
      } else if (RULE.test(line)) {
        out.push(element("hr"));
        at += 1;
      } else if (QUOTE.test(line) && depth < DEEPEST) {
        const inner = [];
        for (; at < lines.length && QUOTE.test(lines[at]); at += 1) inner.push(QUOTE.exec(lines[at])[1]);
        out.push(element("blockquote", ...blocks(inner, depth + 1)));
      } else if (ITEM.test(line) && depth < DEEPEST) {
        const [made, next] = list(lines, at, depth);
        out.push(made);
        at = next;
      } else {
        const words = [line];
        for (at += 1; at < lines.length && lines[at].trim() && !opens(lines[at]); at += 1) words.push(lines[at]);
        out.push(element("p", ...inline(words.join("\n"))));
      }
    }
    return out;
  }

  return (text) => blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0);
})();
