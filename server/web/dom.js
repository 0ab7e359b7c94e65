// Nodes, and what the page says to its reader. Text only ever becomes text: nothing here parses HTML.

export const $ = (selector, root = document) => root.querySelector(selector);

/** An element; `on…` are listeners, false and null attributes are left out, strings become text. */
export function h(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    if (name.startsWith('on')) node.addEventListener(name.slice(2), value);
    else node.setAttribute(name, value === true ? '' : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== false));
  return node;
}

/** One of the symbols of index.html. */
export function icon(name) {
  const svg = document.createElementNS('http://www.w3.org/2000/svg', 'svg');
  const use = document.createElementNS('http://www.w3.org/2000/svg', 'use');
  use.setAttribute('href', `#i-${name}`);
  svg.setAttribute('aria-hidden', 'true');
  svg.append(use);
  return svg;
}

export function button(label, symbol, onclick, attributes = {}) {
  return h('button', { type: 'button', class: 'icon', title: label, 'aria-label': label, onclick, ...attributes },
    icon(symbol));
}

/** Say it to those who cannot see it. */
export function announce(text) {
  $('#live').textContent = text;
}

/** Show a line above the conversation, or none. */
export function notice(text = '', action = null) {
  const place = $('#notice');
  place.hidden = !text;
  place.replaceChildren(...(text ? [h('span', {}, text), action ?? h('button',
    { type: 'button', onclick: () => notice() }, 'Dismiss')] : []));
}

export const count = (number) => number.toLocaleString('en');

export const plural = (number, what) => `${count(number)} ${what}${number === 1 ? '' : 's'}`;

/** A name that no other has. `crypto.randomUUID` is there on secure origins only. */
export function unique() {
  return [...crypto.getRandomValues(new Uint8Array(16))].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch { // plain http, or no permission
    const field = h('textarea', { 'aria-hidden': 'true', class: 'unseen' });
    field.value = text;
    const before = document.activeElement;
    (before?.closest('dialog') ?? document.body).append(field);
    field.select();
    document.execCommand('copy');
    field.remove();
    before?.focus();
  }
  announce('Copied.');
}

export function download(name, type, text) {
  const url = URL.createObjectURL(new Blob([text], { type }));
  h('a', { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
