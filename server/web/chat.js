// A conversation: its messages, the request that they make, and the answer as it arrives. Knows
// nothing of how it is shown; `onchange` hears of every change.

import { ApiError, Dropped, answer, end } from './api.js';
import { unique } from './dom.js';
import { dataUrl } from './media.js';
import { saveChat, tellTabs } from './store.js';

const SAVE_EVERY = 1000; // milliseconds, while an answer arrives
const LOCATE = 'Please provide the bounding box coordinate of the region this sentence describes: ';

export const newChat = () => ({ id: unique(), title: '', updated: Date.now(), messages: [] });

/** Pictures, without videos, in the order of the request: what boxes count. */
export const picturesBefore = (chat, message) => chat.messages.slice(0, chat.messages.indexOf(message))
  .flatMap((each) => each.media ?? []).filter((each) => each.kind === 'image');

const NUMBERS = ['temperature', 'top_p', 'top_k', 'repetition_penalty', 'seed', 'max_completion_tokens'];

/** The body of a chat request for `messages`. Throws a SyntaxError if the further fields are no JSON. */
export async function toBody(messages, settings) {
  const body = { messages: [] };
  if (settings.model) body.model = settings.model;
  for (const name of NUMBERS) if (Number.isFinite(settings[name])) body[name] = settings[name];
  if (Number.isFinite(settings.budget)) body.visual_budget = { max_tiles: settings.budget };
  if (settings.system) body.messages.push({ role: 'system', content: settings.system });
  for (const message of messages) {
    // An answer that never began is no part of the conversation.
    if (message.role === 'assistant' && message.text) body.messages.push({ role: 'assistant', content: message.text });
    if (message.role === 'user') body.messages.push({ role: 'user', content: await content(message, settings) });
  }
  return { ...body, ...further(settings) };
}

export function further({ more }) {
  if (!more?.trim()) return {};
  const fields = JSON.parse(more);
  if (typeof fields !== 'object' || Array.isArray(fields)) throw new SyntaxError('Not an object.');
  return fields;
}

async function content({ text, locate, media = [] }, { tiles }) {
  const words = locate ? `${LOCATE}<ref>${text}</ref>` : text;
  if (!media.length) return words;
  const parts = await Promise.all(media.map(async (each) => ({
    type: `${each.kind}_url`,
    [`${each.kind}_url`]: { url: await dataUrl(each), ...(Number.isFinite(tiles) && { max_tiles: tiles }) },
  })));
  return words ? [...parts, { type: 'text', text: words }] : parts;
}

/** Answers that are arriving, by the id of their conversation. */
export const runs = new Map();

/** Ask for the answer to what `chat` ends with. `onkept` hears when the conversation is stored. */
export async function ask(chat, settings, { onchange, onkept }) {
  const message = { role: 'assistant', text: '', boxes: [], state: 'running', name: unique(), place: null };
  const before = [...chat.messages];
  chat.messages.push(message);
  chat.title ||= (before.at(-1).text || before.at(-1).media?.[0]?.name || 'Conversation').slice(0, 80);
  await run(chat, message, { onchange, onkept, makeBody: () => toBody(before, settings) });
}

/** Go on with an answer that was arriving when the page was closed. */
export async function resume(chat, { onchange, onkept }) {
  const message = chat.messages.at(-1);
  if (message?.state !== 'running' || runs.has(chat.id)) return;
  if (!message.place) {
    Object.assign(message, { state: 'failed', error: { message: 'The page was closed before the answer began.' } });
    onchange(message);
    return;
  }
  await run(chat, message, { onchange, onkept, makeBody: null });
}

async function run(chat, message, { onchange, onkept, makeBody }) {
  const controller = new AbortController();
  const began = performance.now();
  const timing = {};
  let saved = began;
  const stop = () => {
    message.state = 'stopped';
    controller.abort();
    end(message.name);
  };
  const keep = async () => {
    chat.kept = await saveChat(chat);
    onkept();
  };
  runs.set(chat.id, stop);
  onchange(message);
  keep();
  try {
    const body = makeBody && await makeBody();
    const chunks = answer({
      body, name: message.name, place: message.place, signal: controller.signal,
      onplace: (place) => { message.place = place; keep(); },
      onstate: (state) => { message.lost = state === 'lost'; onchange(message); },
    });
    let again = !body;
    for await (const chunk of chunks) {
      if (again) Object.assign(message, { text: '', boxes: [] }); // from its beginning
      again = false;
      const now = performance.now();
      if (take(message, chunk)) timing.first ??= now - began;
      // What a resumed stream repeats was timed by nobody.
      if (chunk.usage) Object.assign(message, { usage: chunk.usage, timing: body ? { ...timing, total: now - began } : null });
      onchange(message);
      if (now - saved > SAVE_EVERY) {
        saved = now;
        keep();
      }
    }
    message.state = 'done';
  } catch (error) {
    if (message.state !== 'stopped') fail(message, error);
  }
  Object.assign(message, { lost: false, place: null });
  chat.updated = Date.now();
  if (runs.get(chat.id) === stop) runs.delete(chat.id); // else there is another one already
  onchange(message);
  await keep();
  tellTabs(chat.id);
}

/** Take in a chunk; whether it has anything to read. */
function take(message, { choices: [choice] }) {
  if (!choice) return false;
  const { content: text = '', boxes = [], tool_calls: calls = [] } = choice.delta;
  message.text += text;
  for (const { function: { name, arguments: given } } of calls) message.text += (name ? `\n\n\`${name}\` ` : '') + given;
  message.boxes.push(...boxes);
  message.finish = choice.finish_reason ?? message.finish;
  return Boolean(text || boxes.length || calls.length);
}

function fail(message, error) {
  message.state = 'failed';
  message.error = { message: error.message, code: error.code ?? null, status: error.status ?? null };
  if (error instanceof SyntaxError) message.error.message = 'The further fields in the settings are no JSON object.';
  else if (error instanceof ApiError && [404, 410].includes(error.status) && message.place) {
    message.error.message = 'The rest of this answer is no longer there.';
  } else if (!(error instanceof ApiError || error instanceof Dropped)) console.error(error);
}
