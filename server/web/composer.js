// Where a message is written: text, pictures and videos by picker, drop or paste, and what sending it
// would cost.

import { preview as askPreview } from './api.js';
import { toBody } from './chat.js';
import { $, announce, button, h, icon, notice, plural, unique, count } from './dom.js';
import { kindOf, preview, sent } from './media.js';

const PAUSE = 350; // milliseconds without typing before the cost is asked for
const HEAVY = 4 << 20; // bytes that are not sent again because a word has changed

const FITS_ITSELF = CSS.supports('field-sizing', 'content');

export class Composer {
  /** `send(message)` and `stop()` are what its button does; `context()` is `{chat, settings}`. */
  constructor({ send, stop, context, editLast }) {
    Object.assign(this, { send, stop, context, media: [], most: Infinity, running: false, asking: null, timer: 0 });
    this.field = $('#draft');
    this.field.addEventListener('input', () => this.changed(true));
    this.field.addEventListener('keydown', (event) => {
      if (event.key === 'Enter' && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        if (!this.running) this.submit();
      } else if (event.key === 'ArrowUp' && !this.field.value && !this.running) {
        event.preventDefault();
        editLast();
      }
    });
    $('#send').addEventListener('click', () => (this.running ? this.stop() : this.submit()));
    $('#attach').addEventListener('click', () => $('#files').click());
    $('#files').addEventListener('change', ({ target }) => {
      this.attach(target.files);
      target.value = '';
    });
    $('#locate').addEventListener('click', ({ currentTarget }) => {
      this.locate = !this.locate;
      currentTarget.setAttribute('aria-pressed', String(this.locate));
      this.field.placeholder = this.locate ? 'Name what to find in the picture' : 'Ask about a picture';
      this.changed();
      this.field.focus();
    });
    this.field.addEventListener('paste', (event) => {
      if (!event.clipboardData.files.length) return;
      event.preventDefault();
      this.attach(event.clipboardData.files);
    });
    this.listenToDrops();
    this.changed();
  }

  listenToDrops() {
    const hasFiles = (event) => event.dataTransfer?.types.includes('Files');
    const mark = (on) => document.body.classList.toggle('dropping', on);
    addEventListener('dragover', (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      mark(true);
    });
    addEventListener('dragleave', (event) => { if (!event.relatedTarget) mark(false); });
    addEventListener('drop', (event) => {
      if (!hasFiles(event)) return;
      event.preventDefault();
      mark(false);
      this.attach(event.dataTransfer.files);
    });
  }

  /** Add pictures and videos to the message. */
  attach(files) {
    const added = [];
    for (const file of files) {
      const kind = kindOf(file);
      const one = { id: unique(), kind, name: file.name || `pasted ${kind}`, blob: file };
      if (!kind) notice(`${file.name} is neither a picture nor a video.`);
      else if (sent([...this.allMedia, ...added, one]) > this.most) {
        notice(`${one.name} is too large: a request with everything in it may have ${count(this.most >> 20)} MiB.`);
      } else added.push(one);
    }
    if (!added.length) return;
    this.media.push(...added);
    announce(`Attached: ${added.map((each) => each.name).join(', ')}.`);
    this.drawMedia();
    this.field.focus();
  }

  drawMedia() {
    const list = $('#attached');
    list.hidden = !this.media.length;
    list.replaceChildren(...this.media.map((each) => h('li', {}, preview(each),
      h('span', { class: 'cost', id: `cost-${each.id}` }),
      button(`Remove ${each.name}`, 'stop', () => {
        this.media = this.media.filter((other) => other !== each);
        announce(`Removed: ${each.name}.`);
        this.drawMedia();
        this.field.focus();
      }))));
    this.changed();
  }

  /** Of the request: the conversation's, and those of the message. */
  get allMedia() {
    return [...this.context().chat.messages.flatMap((each) => each.media ?? []), ...this.media];
  }

  get draft() {
    const text = this.field.value.trim();
    return { role: 'user', text, media: this.media, locate: Boolean(this.locate && text) };
  }

  get isEmpty() {
    return !this.media.length && !this.field.value.trim();
  }

  submit() {
    if (this.isEmpty) return;
    const message = this.draft;
    this.media = [];
    this.field.value = '';
    this.drawMedia();
    this.send(message);
  }

  /** Whether an answer arrives: then the button stops it. */
  setRunning(running) {
    this.running = running;
    const label = running ? 'Stop' : 'Send';
    const send = $('#send');
    send.setAttribute('aria-label', label);
    send.title = running ? 'Stop (Escape)' : 'Send (Enter)';
    send.replaceChildren(icon(running ? 'halt' : 'send'));
    this.enable();
  }

  enable() {
    $('#send').disabled = !this.running && this.isEmpty;
  }

  /** Ask again what the message would cost, in a while; after a word not if that is much to send. */
  changed(byTyping = false) {
    this.enable();
    if (!FITS_ITSELF) {
      this.field.style.height = 'auto';
      this.field.style.height = `${this.field.scrollHeight}px`;
    }
    const told = $('#cost').textContent;
    if (byTyping && told && !this.isEmpty && sent(this.allMedia) > HEAVY) {
      this.tell(`about ${told.replace(/^about /, '')}`);
      return;
    }
    clearTimeout(this.timer);
    this.asking?.abort();
    if (this.isEmpty) this.tell('');
    else this.timer = setTimeout(() => this.price(), PAUSE);
  }

  async price() {
    const { chat, settings } = this.context();
    const asking = new AbortController();
    this.asking = asking;
    let body;
    try {
      body = await toBody([...chat.messages, this.draft], settings);
      const told = await askPreview(body, asking.signal);
      if (!asking.signal.aborted) this.tellCost(told);
    } catch (error) {
      // A refusal of the message is worth knowing before it is sent; all else shows when it is.
      const isOurs = error.status === 400 || error.status === 413;
      const part = error.param?.match(/^messages\[(\d+)\]\.content\[(\d+)\]/);
      const wrong = part && Number(part[1]) === body.messages.length - 1 ? this.media[part[2]] : null;
      if (!asking.signal.aborted) this.tell(isOurs ? `${wrong ? `${wrong.name}: ` : ''}${error.message}` : '', isOurs);
    }
  }

  tellCost(told) {
    const own = told.parts.slice(-this.media.length);
    const mediaCosts = this.media.length ? own : [];
    mediaCosts.forEach((part, index) => {
      const label = document.getElementById(`cost-${this.media[index].id}`);
      if (label) label.textContent = (part.frames ? `${part.frames} fr · ` : '') + plural(part.tiles, 'tile');
    });
    const tiles = told.parts.reduce((sum, part) => sum + part.tiles, 0);
    const pictures = tiles ? ` · ${plural(tiles, 'tile')}` : '';
    const text = `${count(told.prompt_tokens)} of ${count(told.max_model_len)} tokens${pictures}`;
    const less = told.largest && ` With ${plural(told.largest.visual_budget.max_tiles, 'tile')} in all (settings) it would.`;
    this.tell(told.fits ? text : `${text}: it does not fit.${less ?? ''}`, !told.fits);
  }

  tell(text, isWrong = false) {
    const place = $('#cost');
    if (isWrong && place.textContent !== text) announce(text);
    place.textContent = text;
    place.classList.toggle('wrong', isWrong);
  }
}
