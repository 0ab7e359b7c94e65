// The conversation as it is shown. An answer that arrives is drawn once a frame, and only what is new
// of it; it is read out when it is whole.

import { figures, withoutNumbers } from './boxes.js';
import { picturesBefore } from './chat.js';
import { $, announce, button, copy, count, h, plural } from './dom.js';
import { show } from './markdown.js';
import { preview } from './media.js';

const NEAR = 80; // pixels from the end in which new text is followed
const READ_OUT = 2000; // characters
const PACE = 16; // tokens that are enough to speak of tokens per second

export class Log {
  /** `edit(message, text)` and `again(message)` are what its buttons do. */
  constructor(place, { edit, again }) {
    Object.assign(this, { place, edit, again, chat: null, nodes: new Map(), due: new Set(), follows: true });
    const scroller = $('#scroller');
    const toEnd = () => { scroller.scrollTop = scroller.scrollHeight; };
    scroller.addEventListener('scroll', () => {
      this.follows = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < NEAR;
    });
    // Pictures change the height too, when they are there.
    const watcher = new ResizeObserver(() => { if (this.follows) toEnd(); });
    for (const each of [place, scroller]) watcher.observe(each);
  }

  /** Show all of `chat`. */
  open(chat) {
    this.chat = chat;
    this.follows = true;
    this.refresh();
  }

  /** Show which messages there are now. */
  refresh() {
    const { messages } = this.chat;
    for (const [message, node] of this.nodes) {
      if (messages.includes(message)) continue;
      node.remove();
      this.nodes.delete(message);
    }
    for (const message of messages) if (!this.nodes.has(message)) this.add(message);
  }

  add(message) {
    const node = message.role === 'user' ? this.question(message) : this.answer(message);
    this.nodes.set(message, node);
    this.place.append(node);
    if (message.role === 'assistant') this.draw(message);
    this.follows = true;
  }

  /** `message` has changed; the last time because it is over. */
  update(message) {
    if (!this.nodes.has(message)) return;
    if (message.state !== 'running') this.readOut(message);
    if (!this.due.size) requestAnimationFrame(() => this.drawDue());
    this.due.add(message);
  }

  drawDue() {
    for (const message of this.due) if (this.nodes.has(message)) this.draw(message);
    this.due.clear();
  }

  readOut(message) {
    const ends = { done: 'Answer: ', stopped: 'Stopped. ', failed: `${message.error?.message} ` };
    announce(ends[message.state] + message.text.slice(0, READ_OUT));
  }

  question(message) {
    const media = message.media ?? [];
    return h('article', { class: 'user' },
      h('h2', { class: 'unseen' }, 'You'),
      media.length ? h('ul', { class: 'shown', 'aria-label': 'Attached' },
        media.map((each) => h('li', {}, preview(each, true)))) : null,
      message.text ? h('div', { class: 'text' }, message.locate ? h('b', {}, 'Locate ') : null, message.text) : null,
      h('div', { class: 'actions' },
        button('Edit', 'edit', () => this.startEdit(message)),
        button('Copy', 'copy', () => copy(message.text))));
  }

  startEdit(message) {
    const node = this.nodes.get(message);
    const finish = () => {
      this.redraw(message);
      $('[aria-label=Edit]', this.nodes.get(message)).focus();
    };
    const save = () => this.edit(message, field.value.trim());
    const field = h('textarea', {
      'aria-label': 'Edit the message',
      rows: Math.min(message.text.split('\n').length + 1, 12),
      onkeydown: (event) => {
        if (event.key === 'Escape') finish();
        else if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) save();
        else return;
        event.preventDefault();
        event.stopPropagation();
      },
    });
    field.value = message.text;
    const editor = h('div', { class: 'editor' }, field, h('div', { class: 'row' },
      h('button', { type: 'button', onclick: finish }, 'Cancel'),
      h('button', { type: 'button', class: 'main', onclick: save }, 'Send')));
    $('.text', node)?.remove();
    $('.actions', node).replaceWith(editor);
    field.focus();
  }

  redraw(message) {
    const node = this.question(message);
    this.nodes.get(message).replaceWith(node);
    this.nodes.set(message, node);
  }

  /** The last question of the user is to be changed. */
  editLast() {
    const last = this.chat.messages.findLast((each) => each.role === 'user');
    if (last) this.startEdit(last);
  }

  answer(message) {
    return h('article', { class: 'answer' },
      h('h2', { class: 'unseen' }, 'Answer'),
      h('div', { class: 'text' }), h('div', { class: 'figures' }), h('div', { class: 'note' }),
      h('div', { class: 'actions' },
        button('Copy', 'copy', () => copy(message.text)),
        button('Regenerate', 'again', () => this.again(message)),
        h('span', { class: 'stats' })));
  }

  draw(message) {
    const node = this.nodes.get(message);
    const isRunning = message.state === 'running';
    node.setAttribute('aria-busy', String(isRunning));
    node.classList.toggle('arriving', isRunning && !message.lost);
    node.classList.toggle('waiting', isRunning && !message.text && !message.boxes.length);
    const drawn = message.boxes.filter((box) => box.image_index !== null);
    show($('.text', node), drawn.length ? withoutNumbers(message.text, drawn) : message.text);
    const place = $('.figures', node);
    if (place.dataset.boxes !== String(drawn.length)) {
      place.dataset.boxes = drawn.length;
      place.replaceChildren(...figures(drawn, picturesBefore(this.chat, message)));
    }
    $('.note', node).replaceChildren(...this.note(message));
    $('.stats', node).textContent = isRunning ? '' : stats(message);
  }

  note(message) {
    const again = h('button', { type: 'button', onclick: () => this.again(message) }, 'Try again');
    if (message.lost) return [h('p', { class: 'hint' }, 'The connection is lost. Reconnecting …')];
    if (message.state === 'stopped') return [h('p', { class: 'hint' }, 'Stopped.')];
    if (message.state === 'failed') {
      const { code, message: text } = message.error;
      return [h('div', { class: 'error' }, h('p', {}, text), code ? h('code', {}, code) : null, again)];
    }
    if (message.finish === 'length') return [h('p', { class: 'hint' }, 'Cut off: no more tokens were allowed, or fit.')];
    return [];
  }
}

/** What an answer has taken. */
function stats({ usage, timing }) {
  if (!usage) return '';
  const parts = [`${count(usage.prompt_tokens)} + ${plural(usage.completion_tokens, 'token')}`];
  const shown = [...(usage.internvl?.images ?? []), ...(usage.internvl?.videos ?? [])];
  if (shown.length) parts.push(plural(shown.reduce((sum, each) => sum + each.tiles, 0), 'tile'));
  if (usage.prompt_tokens_details?.cached_tokens) parts.push(`${count(usage.prompt_tokens_details.cached_tokens)} cached`);
  if (timing?.first !== undefined) {
    parts.push(`first after ${seconds(timing.first)}`);
    const rate = (usage.completion_tokens - 1) / ((timing.total - timing.first) / 1000);
    if (usage.completion_tokens >= PACE && Number.isFinite(rate)) parts.push(`${count(Math.round(rate))} tokens/s`);
  }
  return parts.join(' · ');
}

const seconds = (milliseconds) => `${(milliseconds / 1000).toFixed(milliseconds < 9950 ? 2 : 0)} s`;
