// Puts the page together: conversations, settings, the state of the server.

import * as api from './api.js';
import { ask, newChat, resume, runs, toBody } from './chat.js';
import { Composer } from './composer.js';
import { $, announce, button, copy, download, h, notice, unique } from './dom.js';
import { Log } from './log.js';
import * as store from './store.js';

const EXAMPLES = [
  ['shapes.png', 'What is in this picture?'],
  ['two.png', 'green diamond', true],
  ['number.png', 'What number is written here?'],
];
const POLL = 1500; // milliseconds, while the server is not ready

const settings = store.loadSettings();
let chat = newChat();
let polling = 0;
let shownKey = ''; // what it was when the settings were opened

const log = new Log($('#log'), {
  edit(message, text) {
    if (!text && !message.media?.length) return;
    const fresh = { ...message, text, locate: Boolean(message.locate && text) };
    cut(message);
    send(fresh);
  },
  again(message) {
    cut(message);
    answer();
  },
});

const composer = new Composer({
  send, stop: () => runs.get(chat.id)?.(), context: () => ({ chat, settings }), editLast: () => log.editLast(),
});

/** Drop `message` and what comes behind it. */
function cut(message) {
  runs.get(chat.id)?.();
  chat.messages = chat.messages.slice(0, chat.messages.indexOf(message));
  log.refresh();
}

function send(message) {
  notice();
  chat.messages.push(message);
  chat.updated = Date.now();
  log.refresh();
  answer();
}

function answer() {
  toDraft();
  announce('Waiting for the answer.');
  return follow(chat, (listener) => ask(chat, settings, listener));
}

/** Go on typing; but on a touch screen that would show a keyboard. */
function toDraft() {
  if (matchMedia('(pointer: fine)').matches) composer.field.focus();
}

/** `work` on an answer of `own`, which goes on while other conversations are looked at. */
async function follow(own, work) {
  const done = work({
    onchange(message) {
      if (own !== chat) return;
      log.refresh();
      log.update(message);
      composer.setRunning(runs.has(own.id));
      $('#welcome').hidden = true;
    },
    onkept: drawChats,
  });
  store.setCurrentChat(own.id);
  await done;
  if (own.messages.at(-1)?.error?.status === 401) openSettings(own.messages.at(-1).error.message);
  if (own.kept === false) notice('The browser has no room to keep this conversation: it is gone when the page is closed.');
}

async function openChat(id) {
  wanted = id;
  const found = opened.get(id) ?? (id && await store.loadChat(id));
  if (wanted !== id) return; // another was chosen meanwhile
  chat = found || newChat();
  opened.set(chat.id, chat);
  store.setCurrentChat(found ? chat.id : null);
  $('#welcome').hidden = chat.messages.length > 0;
  log.open(chat);
  composer.setRunning(runs.has(chat.id));
  composer.changed();
  drawChats();
  if (!runs.has(chat.id) && chat.messages.at(-1)?.state === 'running') {
    follow(chat, (listener) => resume(chat, listener));
  }
}

let wanted = null; // the conversation that was chosen last

/** Another tab has added to a conversation: what is added here must come behind that. */
async function takeOver(id) {
  const found = await store.loadChat(id);
  if (found && !runs.has(id)) {
    opened.delete(id);
    if (id === chat.id) {
      opened.set(id, found);
      await openChat(id);
    }
  }
  await drawChats();
}

const opened = new Map([[chat.id, chat]]); // those that may be arriving must not be loaded again

async function drawChats() {
  const chats = await store.listChats();
  // Not without need: the focus may be there.
  const news = JSON.stringify([chat.id, chats.map(({ id, title }) => [id, title])]);
  if ($('#chats').dataset.shown === news) return;
  $('#chats').dataset.shown = news;
  $('#chats').replaceChildren(...chats.map(({ id, title }) => h('li', {},
    h('button', { type: 'button', 'aria-current': id === chat.id && 'true', onclick: () => leave(id) }, title),
    button(`Delete ${title}`, 'trash', async () => {
      runs.get(id)?.();
      if (opened.has(id)) opened.get(id).deleted = true; // its answer may end later
      opened.delete(id);
      await store.deleteChat(id);
      if (id === chat.id) await openChat(null);
      else await drawChats();
      $('#new').focus();
    }))));
}

function leave(id) {
  openChat(id);
  if (narrow.matches) toggleSide(false);
  toDraft();
}

const narrow = matchMedia('(max-width: 60rem)');
narrow.addEventListener('change', () => toggleSide(!narrow.matches));

function toggleSide(open = !document.body.classList.contains('side')) {
  document.body.classList.toggle('side', open);
  $('#side').inert = !open;
  $('#menu').setAttribute('aria-expanded', String(open));
}

function drawExamples() {
  $('#examples').replaceChildren(...EXAMPLES.map(([file, text, locate]) => {
    const url = new URL(file, import.meta.url);
    return h('button', {
      type: 'button',
      onclick: async () => {
        try {
          const blob = await (await fetch(url)).blob();
          send({ role: 'user', text, locate: Boolean(locate), media: [{ id: unique(), kind: 'image', name: file, blob }] });
        } catch {
          notice('The server cannot be reached.');
        }
      },
    }, h('img', { src: url.href, alt: '' }), h('span', {}, locate ? `Locate the ${text}` : text));
  }));
}

// Settings. A field that is empty leaves it to the server.

function bindSettings() {
  for (const field of document.querySelectorAll('[data-setting]')) {
    const name = field.dataset.setting;
    field.value = settings[name] ?? '';
    field.addEventListener('input', () => {
      if (field.value === '') delete settings[name];
      else settings[name] = field.type === 'number' ? field.valueAsNumber : field.value;
      store.saveSettings(settings);
      if (name === 'theme') showTheme();
      composer.changed();
    });
  }
  const kept = store.loadKey();
  api.useKey(kept.key);
  $('#key').value = kept.key;
  $('#remember').checked = kept.remember;
  const changed = () => {
    const key = $('#key').value.trim();
    store.saveKey(key, $('#remember').checked);
    api.useKey(key);
  };
  $('#key').addEventListener('input', changed);
  $('#remember').addEventListener('change', changed);
  $('form').addEventListener('submit', (event) => {
    event.preventDefault();
    $('#settings').close();
  });
  $('#settings').addEventListener('close', () => {
    $('#wrong-key').textContent = '';
    if ($('#key').value === shownKey) return;
    const last = chat.messages.at(-1);
    if (last?.error?.status === 401) log.again(last);
    connect();
  });
  $('#close').addEventListener('click', () => $('#settings').close());
  $('#reset').addEventListener('click', () => {
    for (const field of document.querySelectorAll('[data-setting]:not(#theme)')) {
      field.value = '';
      field.dispatchEvent(new Event('input'));
    }
  });
}

/** Show the settings; because of a key, if one is wrong or missing. */
function openSettings(wrongKey = '') {
  if (!$('#settings').open) {
    shownKey = $('#key').value;
    $('#settings').showModal();
  }
  $('#wrong-key').textContent = wrongKey;
  if (wrongKey) $('#key').focus();
}

function showTheme() {
  document.documentElement.dataset.theme = settings.theme ?? '';
}

/** The model's name, as soon as the server has one. */
async function connect() {
  clearTimeout(polling);
  const { status, reason, progress } = await api.readiness();
  if (status !== 'ready') {
    const share = progress?.total ? ` (${Math.round(100 * progress.done / progress.total)} %)` : '';
    notice(reason ? `The server is not ready: ${reason}${share}.` : 'The server cannot be reached.');
    $('#notice').dataset.state = 'waiting';
    polling = setTimeout(connect, POLL);
    return;
  }
  if ($('#notice').dataset.state) notice();
  delete $('#notice').dataset.state;
  try {
    const models = await api.models();
    composer.most = await api.mostBytes();
    if (!models.some((each) => each.id === settings.model)) delete settings.model;
    $('#model').replaceChildren(...models.map(({ id }) => h('option', { value: id, selected: id === settings.model }, id)));
    composer.changed();
  } catch (error) {
    if (error.status === 401) openSettings(error.message);
    else notice(error.message);
  }
}

function transcript() {
  return chat.messages.map(({ role, text, media = [] }) => [
    role === 'user' ? '**You**' : '**Answer**', ...media.map((each) => `[${each.kind}: ${each.name}]`), text,
  ].join('\n\n')).join('\n\n');
}

async function exportChat() {
  try {
    // The body of a request: it can be sent again as it is.
    const body = { model: $('#model').value, ...await toBody(chat.messages, settings) };
    download('conversation.json', 'application/json', JSON.stringify(body, null, 1));
  } catch {
    notice('The further fields in the settings are no JSON object.');
  }
}

showTheme();
bindSettings();
drawExamples();
toggleSide(!narrow.matches);
composer.setRunning(false);
$('#new').addEventListener('click', () => leave(null));
$('#menu').addEventListener('click', () => toggleSide());
$('#shade').addEventListener('click', () => toggleSide(false));
$('#open-settings').addEventListener('click', () => openSettings());
$('#copy-chat').addEventListener('click', () => copy(transcript()));
$('#export').addEventListener('click', exportChat);
$('#model').addEventListener('change', ({ target }) => {
  settings.model = target.value;
  store.saveSettings(settings);
});
addEventListener('keydown', (event) => {
  if (event.key !== 'Escape' || event.defaultPrevented || event.isComposing || $('#settings').open) return;
  if (narrow.matches && document.body.classList.contains('side')) {
    toggleSide(false);
    $('#menu').focus();
  } else runs.get(chat.id)?.();
});
store.hearTabs(takeOver);
openChat(store.currentChat());
connect();
