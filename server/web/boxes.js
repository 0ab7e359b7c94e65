// Boxes of an answer, drawn over the picture that they are in, with a list beside it.

import { h } from './dom.js';
import { urlOf } from './media.js';

const COLOURS = 6; // in style.css

/** What `[[…]]` stands for is drawn: the text goes without it, and away if only labels are left. */
export function withoutNumbers(text, boxes) {
  const words = text.replace(/\s*\[\[[\d\s.,[\]-]*(\]\]|$)/g, ''); // not complete yet, perhaps
  return boxes.reduce((rest, { label }) => rest.replace(label ?? '', ''), words).trim() && words;
}

/** One figure for each picture with boxes; `pictures` are those of the request, in order. */
export function figures(boxes, pictures) {
  const labels = [...new Set(boxes.map((box) => box.label))];
  const colour = (box) => `c${labels.indexOf(box.label) % COLOURS}`;
  return [...new Set(boxes.map((box) => box.image_index))].filter((index) => pictures[index]).map((index) => {
    const own = boxes.filter((box) => box.image_index === index);
    const list = own.map((box) => h('li', { class: colour(box) }, h('b', {}, box.label ?? 'box'),
      ` ${box.box_px.slice(0, 2).join(', ')} to ${box.box_px.slice(2).join(', ')}`));
    return h('figure', { class: 'grounded' },
      h('div', { class: 'frame' }, h('img', { src: urlOf(pictures[index].blob), alt: pictures[index].name }),
        own.map((box) => outline(box, colour(box)))),
      h('figcaption', {}, h('ul', { 'aria-label': 'Found, in pixels' }, list)));
  });
}

function outline({ box, label }, colour) {
  // Thousandths of width and height, in any order, and perhaps outside.
  const edges = box.map((number) => Math.min(Math.max(number / 10, 0), 100));
  const [[left, right], [top, bottom]] = [0, 1].map((axis) => [edges[axis], edges[axis + 2]].sort((a, b) => a - b));
  const node = h('div', { class: `box ${colour}`, 'aria-hidden': 'true' }, label ? h('span', {}, label) : null);
  Object.assign(node.style, {
    left: `${left}%`, top: `${top}%`, width: `${right - left}%`, height: `${bottom - top}%`,
  });
  return node;
}
