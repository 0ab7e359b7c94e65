// Markdown as nodes. What a model writes is never parsed as HTML; links lead to http and https only,
// and pictures are not loaded, because their addresses could carry what was said to somebody else.

import { button, copy, h } from './dom.js';

const DEPTH = 8; // of lists and quotes in each other
const LONGEST = 20000; // characters of a paragraph that is searched for marks

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const HEADING = /^ {0,3}(#{1,6})[ \t]+(.*)$/;
const RULE = /^ {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])[ \t]+(?=\S)/;
const DIVIDER = /^ *\|?(?: *:?-+:? *\|)* *:?-+:? *(?:\| *)?$/;

/** Show `text` in `place`. Nodes of what has not changed since the last call stay as they are. */
export function show(place, text) {
  const shown = place.sources ?? [];
  const sources = pieces(text);
  let same = 0;
  while (same < sources.length && sources[same] === shown[same]) same += 1;
  while (place.children.length > same) place.lastElementChild.remove();
  for (const source of sources.slice(same)) {
    // One element for each piece, so that they can be counted.
    place.append(h('div', { class: 'piece' }, parse(source.split('\n'), 0)));
  }
  place.sources = sources;
}

/** `text` cut at blank lines, but for those inside of fences and lists. */
function pieces(text) {
  const found = [];
  let piece = [];
  let fence = null;
  let list = false;
  for (const line of text.replaceAll('\r', '').split('\n')) {
    const mark = FENCE.exec(line)?.[1];
    const goesOn = list && (ITEM.test(line) || /^ {2,}\S/.test(line));
    if (!fence && piece.at(-1) === '' && line && !goesOn) {
      found.push(piece.join('\n'));
      piece = [];
    }
    if (!piece.length) list = ITEM.test(line);
    if (fence ? closes(line, fence) : mark) fence = fence ? null : mark;
    if (line || piece.length) piece.push(line.trim() || fence ? line : '');
  }
  if (piece.length) found.push(piece.join('\n'));
  return found;
}

const closes = (line, fence) => line.trim().startsWith(fence) && !line.trim().replaceAll(fence[0], '');

function parse(lines, depth) {
  const nodes = [];
  for (let at = 0; at < lines.length;) {
    const reader = READERS.find((each) => each.starts(lines, at, depth)) ?? PARAGRAPH;
    const [node, next] = reader.read(lines, at, depth);
    if (node) nodes.push(node);
    at = next;
  }
  return nodes;
}

/** The first line from `at` on that `stop` holds for. */
function until(lines, at, stop) {
  while (at < lines.length && !stop(lines[at], at)) at += 1;
  return at;
}

const BLANK = { starts: (lines, at) => !lines[at].trim(), read: (lines, at) => [null, at + 1] };

const CODE = {
  starts: (lines, at) => FENCE.test(lines[at]),
  read(lines, at) {
    const [, fence, language] = FENCE.exec(lines[at]);
    const end = until(lines, at + 1, (line) => closes(line, fence));
    const text = lines.slice(at + 1, end).join('\n');
    const head = h('div', { class: 'bar' }, h('span', {}, language || 'text'), button('Copy code', 'copy', () => copy(text)));
    return [h('div', { class: 'code' }, head, h('pre', { tabindex: '0' }, h('code', {}, text))), end + 1];
  },
};

const TITLE = {
  starts: (lines, at) => HEADING.test(lines[at]),
  read(lines, at) {
    const [, marks, text] = HEADING.exec(lines[at]);
    // Below the page's own headings.
    return [h(`h${Math.min(marks.length + 2, 6)}`, {}, inline(text.trim())), at + 1];
  },
};

const LINE = { starts: (lines, at) => RULE.test(lines[at]), read: (lines, at) => [h('hr'), at + 1] };

const QUOTE = {
  starts: (lines, at, depth) => depth < DEPTH && lines[at].trimStart().startsWith('>'),
  read(lines, at, depth) {
    const end = until(lines, at, (line) => !line.trimStart().startsWith('>'));
    const inner = lines.slice(at, end).map((line) => line.trimStart().slice(1).replace(/^ /, ''));
    return [h('blockquote', {}, parse(inner, depth + 1)), end];
  },
};

const LIST = {
  starts: (lines, at, depth) => depth < DEPTH && ITEM.test(lines[at]),
  read(lines, at, depth) {
    const [, indent, marker] = ITEM.exec(lines[at]);
    const ordered = marker.length > 1;
    const isNext = (line) => {
      const found = ITEM.exec(line);
      return found && found[1].length <= indent.length + 1 && found[2].length > 1 === ordered;
    };
    const items = [];
    while (at < lines.length && isNext(lines[at])) {
      const width = ITEM.exec(lines[at])[0].length;
      const end = until(lines, at + 1, (line, index) => {
        if (!line.trim()) return false;
        if (line.search(/\S/) > indent.length + 1) return false;
        return ITEM.test(line) || !lines[index - 1].trim() || READERS.some((each) => each.starts(lines, index, depth));
      });
      const inner = lines.slice(at + 1, end).map((line) => line.slice(Math.min(width, Math.max(line.search(/\S/), 0))));
      const nodes = parse([lines[at].slice(width), ...inner], depth + 1);
      // An item of one paragraph needs no gap around it.
      items.push(h('li', {}, nodes.flatMap((node) => (node.tagName === 'P' ? [...node.childNodes] : [node]))));
      at = end;
    }
    const start = ordered && parseInt(marker, 10) !== 1 ? parseInt(marker, 10) : null;
    return [h(ordered ? 'ol' : 'ul', { start }, items), at];
  },
};

const TABLE = {
  starts: (lines, at) => lines[at].includes('|') && lines[at + 1]?.includes('-') && DIVIDER.test(lines[at + 1]),
  read(lines, at) {
    const end = until(lines, at + 2, (line) => !line.includes('|'));
    const sides = cells(lines[at + 1]).map((cell) => (cell.endsWith(':') ? (cell.startsWith(':') ? 'centre' : 'right') : null));
    const row = (line, tag) => h('tr', {}, cells(line).map((cell, i) => h(tag, { class: sides[i] }, inline(cell))));
    const body = lines.slice(at + 2, end).map((line) => row(line, 'td'));
    const table = h('table', {}, h('thead', {}, row(lines[at], 'th')), h('tbody', {}, body));
    return [h('div', { class: 'scroll', tabindex: '0', role: 'region', 'aria-label': 'Table' }, table), end];
  },
};

function cells(line) {
  const inner = line.trim().replace(/^\|/, '').replace(/\|$/, '');
  return inner.split(/(?<!\\)\|/).map((cell) => cell.trim().replaceAll('\\|', '|'));
}

const PARAGRAPH = {
  read(lines, at, depth) {
    const end = until(lines, at + 1, (_, index) => READERS.some((each) => each.starts(lines, index, depth)));
    return [h('p', {}, inline(lines.slice(at, end).map((line) => line.trim()).join('\n'))), end];
  },
};

const READERS = [BLANK, CODE, TITLE, LINE, QUOTE, LIST, TABLE];

const MARKS = /\\([!-/:-@[-`{-~])|(`+)|(\*\*|\*|__|_|~~)|(!?\[)|(https?:\/\/[^\s<>"'`]+)/g;
const TAGS = { '**': 'strong', __: 'strong', '*': 'em', _: 'em', '~~': 'del' };
const WORD = /[\p{L}\p{N}_]/u;

/** Marks inside of a line, as nodes and strings. */
function inline(text, depth = 0) {
  if (depth > 6 || text.length > LONGEST) return [text];
  const nodes = [];
  const lonely = new Set(); // marks that nothing closes from here on: else each would search to the end
  let from = 0;
  MARKS.lastIndex = 0;
  for (let found = MARKS.exec(text); found; found = MARKS.exec(text)) {
    const [node, end] = read(text, found, depth, lonely) || [found[0], found.index + found[0].length];
    nodes.push(text.slice(from, found.index), node);
    from = end;
    MARKS.lastIndex = end; // others may have used it meanwhile
  }
  return [...nodes, text.slice(from)].filter((node) => node !== '');
}

/** What a mark means, with where it ends; nothing if it is only a character. */
function read(text, found, depth, lonely) {
  const [mark, escaped, ticks, emphasis, bracket, address] = found;
  const after = found.index + mark.length;
  if (escaped) return [escaped, after];
  if (lonely.has(mark)) return null;
  if (ticks) {
    const end = closing(text, ticks, after, (at) => text[at - 1] !== '`' && text[at + ticks.length] !== '`');
    if (end < 0) lonely.add(mark);
    return end > 0 && [h('code', {}, text.slice(after, end).replace(/^ (.+) $/s, '$1')), end + ticks.length];
  }
  if (emphasis) {
    const inWord = (at) => mark.startsWith('_') && WORD.test(text[at] ?? '');
    if (!text[after]?.trim() || inWord(found.index - 1)) return null;
    const end = closing(text, mark, after + 1, (at) => text[at - 1].trim()
      && !inWord(at + mark.length) && (mark.length > 1 || (text[at + 1] !== mark && text[at - 1] !== mark)));
    if (end < 0) lonely.add(mark);
    return end > 0 && [h(TAGS[mark], {}, inline(text.slice(after, end), depth + 1)), end + mark.length];
  }
  if (address) {
    const clean = address.replace(/[.,;:!?)\]*_~]+$/, '');
    const url = safe(clean);
    return url && [anchor(url, [clean]), found.index + clean.length];
  }
  return link(text, after, bracket.length > 1, depth);
}

function closing(text, mark, at, fits) {
  do at = text.indexOf(mark, at); while (at > 0 && !fits(at) && ++at);
  return at;
}

/** `[label](address "title")`, whose label begins at `from`. */
function link(text, from, isPicture, depth) {
  const end = balanced(text, from, '[', ']');
  if (end < 0 || text[end + 1] !== '(') return null;
  const stop = balanced(text, end + 2, '(', ')');
  if (stop < 0) return null;
  const url = safe(text.slice(end + 2, stop).trim().split(/\s/)[0].replace(/^<|>$/g, ''));
  const label = text.slice(from, end);
  if (isPicture) return [url ? anchor(url, [`picture: ${label || url}`]) : label, stop + 1];
  return [url ? anchor(url, inline(label, depth + 1)) : h('span', {}, inline(label, depth + 1)), stop + 1];
}

function balanced(text, at, open, close) {
  const most = Math.min(text.length, at + 2000);
  for (let level = 1; at < most; at += 1) {
    if (text[at] === '\\') at += 1;
    else if (text[at] === open) level += 1;
    else if (text[at] === close && !(level -= 1)) return at;
  }
  return -1;
}

/** The address as it is safe to open, or null. */
function safe(address) {
  try {
    const url = new URL(address); // throws at what is relative
    return ['http:', 'https:'].includes(url.protocol) ? url.href : null;
  } catch {
    return null;
  }
}

const anchor = (href, children) => h('a', { href, target: '_blank', rel: 'noopener noreferrer nofollow' }, children);
