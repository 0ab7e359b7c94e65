// The server's API: requests, its errors in its own words, and streams that survive their connection.
// Addresses are relative to the page, which may lie under any path.

/** What the server refused or failed with. */
export class ApiError extends Error {
  constructor(status, detail) {
    super(detail?.message ?? `The server answered with status ${status}.`);
    Object.assign(this, { status, code: detail?.code ?? null, param: detail?.param ?? null });
  }
}

/** The connection is gone, or there was none. */
export class Dropped extends Error {
  constructor() {
    super('The server cannot be reached.');
  }
}

const TRIES = 10; // to come back to a stream, within about 35 seconds
const SILENCE = 60000; // milliseconds; the server sends a comment every 15 seconds, if nothing else

let key = '';

export function useKey(given) {
  key = given;
}

async function request(path, { method = 'GET', body, signal, headers = {} } = {}) {
  headers = { ...headers, ...(key && { Authorization: `Bearer ${key}` }) };
  if (body) headers['Content-Type'] = 'application/json';
  let response;
  try {
    response = await fetch(path, { method, headers, signal, cache: 'no-store', body: body && JSON.stringify(body) });
  } catch (error) {
    throw signal?.aborted ? error : new Dropped();
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => null);
  throw new ApiError(response.status, told?.error);
}

const json = async (path, options) => (await request(path, options)).json();

export const models = async () => (await json('v1/models')).data;

/** Bytes that a request may have. */
export const mostBytes = async () => (await json('server_info')).settings.max_request_bytes;

export const preview = (body, signal) => json('v1/internvl/preview', { method: 'POST', body, signal });

/** Whether requests are answered, with the reason if not. */
export async function readiness() {
  try {
    return await (await fetch('ready', { cache: 'no-store' })).json();
  } catch {
    return { status: 'unreachable' };
  }
}

/** End a request by the name it was sent with. */
export async function end(name) {
  await request(`v1/requests/${name}`, { method: 'DELETE' }).catch(() => {});
}

/** The events of a stream of server-sent events: `{id, data}`. */
export async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = '';
  let event = { data: [] };
  try {
    for (;;) {
      const { value, done } = await within(SILENCE, reader.read());
      if (done) return; // what has no blank line behind it is no event
      rest += value;
      // A \r at the end may be half of a \r\n.
      const lines = rest.split(/\r\n|\n|\r(?!$)/);
      rest = lines.pop();
      for (const line of lines) {
        if (!line) {
          if (event.data.length) yield { id: event.id, data: event.data.join('\n') };
          event = { data: [] };
        } else {
          const [, field, text] = /^([^:]*):? ?(.*)$/s.exec(line);
          if (field === 'data') event.data.push(text);
          else if (field === 'id') event.id = text;
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

function within(milliseconds, promise) {
  let timer;
  const late = new Promise((_, reject) => { timer = setTimeout(() => reject(new Dropped()), milliseconds); });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

/** Before the next try: a while, or until the browser is online again. */
function pause(tries, signal) {
  return new Promise((resolve, reject) => {
    const over = () => {
      clearTimeout(timer);
      removeEventListener('online', over);
      signal.removeEventListener('abort', over);
      if (signal.aborted) reject(signal.reason);
      else resolve();
    };
    const timer = setTimeout(over, Math.min(125 * 2 ** tries, 5000));
    addEventListener('online', over);
    signal.addEventListener('abort', over);
  });
}

/**
 * The chunks of an answer. `body` asks for it, under `name`; without a body it is one that runs
 * already, at `place`. A connection that breaks is opened again where it broke: `onstate` hears of
 * it ('lost', then 'live'), and `onplace` of the address to come back to.
 */
export async function* answer({ body, name, place, signal, onplace = () => {}, onstate = () => {} }) {
  let last = '';
  let isWhole = false;
  let response = null;
  if (body) {
    response = await request('v1/chat/completions', {
      method: 'POST', signal, headers: { 'X-Request-Id': name },
      body: { ...body, stream: true, stream_options: { include_usage: true, resumable: true } },
    });
    const told = response.headers.get('Content-Location');
    place = told && new URL(told, response.url).href;
    onplace(place);
  }
  for (let tries = 0; ;) {
    try {
      response ??= await request(place, { signal, headers: last ? { 'Last-Event-ID': last } : {} });
      if (response.status === 204) return;
      onstate('live');
      for await (const event of events(response.body)) {
        tries = 0;
        last = event.id ?? last;
        isWhole = event.data === '[DONE]';
        if (isWhole) continue; // the connection ends by itself
        const chunk = JSON.parse(event.data);
        if (chunk.error) throw new ApiError(200, chunk.error);
        yield chunk;
      }
    } catch (error) {
      // 502 to 504: what stands between is there, and the server is not.
      const gone = error instanceof Dropped || error instanceof TypeError || (error.status >= 502 && error.status <= 504);
      if (!isWhole && (!gone || signal.aborted)) throw error;
    }
    if (isWhole) return;
    response = null;
    if (!place || ++tries > TRIES) throw new Dropped();
    onstate('lost');
    await pause(tries, signal);
  }
}
