// What the browser keeps: settings, the API key, and conversations with their pictures. Where it has
// no room, or lets nothing be kept, the page goes on without.

const PLACE = `internvl ${location.pathname}`; // another server may have its page under another path
const MOST_CHATS = 100;
const MOST_BYTES = 256 << 20; // of pictures and videos, in all

function read(area, name) {
  try {
    return JSON.parse(area().getItem(`${PLACE} ${name}`));
  } catch {
    return null;
  }
}

function write(area, name, value) {
  try {
    if (value === null) area().removeItem(`${PLACE} ${name}`);
    else area().setItem(`${PLACE} ${name}`, JSON.stringify(value));
  } catch { /* no room, or not allowed */ }
}

// The objects themselves are out of reach where storage is not allowed.
const local = () => localStorage;
const session = () => sessionStorage;

export const loadSettings = () => read(local, 'settings') ?? {};
export const saveSettings = (settings) => write(local, 'settings', settings);

export const loadKey = () => ({ key: read(session, 'key') ?? read(local, 'key') ?? '', remember: read(local, 'key') !== null });

/** Until the tab is closed, or for good. */
export function saveKey(key, remember) {
  write(session, 'key', key || null);
  write(local, 'key', (remember && key) || null);
}

export const currentChat = () => read(session, 'chat');
export const setCurrentChat = (id) => write(session, 'chat', id);

let database = null;

function open() {
  database ??= new Promise((resolve, reject) => {
    const opening = indexedDB.open(PLACE, 1);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore('chats', { keyPath: 'id' });
      opening.result.createObjectStore('media', { keyPath: 'id' }).createIndex('chat', 'chat');
    };
    opening.onsuccess = () => resolve(opening.result);
    opening.onerror = () => reject(opening.error);
  });
  return database;
}

/** `work` inside one transaction over both stores; what its last request found. */
async function transact(mode, work) {
  const transaction = (await open()).transaction(['chats', 'media'], mode);
  return new Promise((resolve, reject) => {
    const last = work(transaction.objectStore('chats'), transaction.objectStore('media'));
    transaction.oncomplete = () => resolve(last?.result);
    transaction.onabort = () => reject(transaction.error);
  });
}

/** All conversations without their pictures, the newest first. */
export async function listChats() {
  const chats = await transact('readonly', (store) => store.getAll()).catch(() => []);
  return chats.sort((a, b) => b.updated - a.updated);
}

/** A conversation, its pictures in place; null if it is not kept. */
export async function loadChat(id) {
  try {
    const chat = await transact('readonly', (store) => store.get(id));
    if (!chat) return null;
    const kept = await transact('readonly', (_, media) => media.index('chat').getAll(id));
    const blobs = new Map(kept.map((each) => [each.id, each.blob]));
    for (const message of chat.messages) {
      message.media = message.media?.map((each) => ({ ...each, blob: blobs.get(each.id) })).filter((each) => each.blob);
    }
    return chat;
  } catch {
    return null;
  }
}

const written = new Set(); // pictures that are kept already

const tabs = new BroadcastChannel(PLACE);

/** Say to other tabs that a conversation is not what it was. */
export const tellTabs = (id) => tabs.postMessage(id);

/** `listener(id)` hears what other tabs say. */
export function hearTabs(listener) {
  tabs.addEventListener('message', ({ data }) => {
    written.clear(); // they may have deleted some
    listener(data);
  });
}

let saving = Promise.resolve(); // one after the other: what is newer must not be overwritten

/** Keep `chat`; older ones go where there is no room. False if it could not be kept. */
export function saveChat(chat) {
  saving = saving.then(() => chat.deleted || save(chat));
  return saving;
}

async function save(chat) {
  const media = chat.messages.flatMap((message) => message.media ?? []);
  const plain = {
    id: chat.id, title: chat.title, updated: chat.updated, bytes: media.reduce((sum, each) => sum + each.blob.size, 0),
    messages: chat.messages.map((message) => ({
      ...message, media: message.media?.map(({ id, kind, name }) => ({ id, kind, name })),
    })),
  };
  for (;;) {
    try {
      await makeRoom(chat.id, plain.bytes);
      const fresh = media.filter((each) => !written.has(each.id));
      await transact('readwrite', (chats, blobs) => {
        for (const { id, blob } of fresh) blobs.put({ id, chat: chat.id, blob });
        return chats.put(plain);
      });
      for (const each of fresh) written.add(each.id);
      return true;
    } catch (error) {
      const others = (await listChats()).filter((each) => each.id !== chat.id);
      if (error?.name !== 'QuotaExceededError' || !others.length) return false;
      await deleteChat(others.at(-1).id);
    }
  }
}

async function makeRoom(id, bytes) {
  const others = (await listChats()).filter((each) => each.id !== id);
  let used = others.reduce((sum, each) => sum + each.bytes, bytes);
  while (others.length && (others.length >= MOST_CHATS || used > MOST_BYTES)) {
    const oldest = others.pop();
    used -= oldest.bytes;
    await deleteChat(oldest.id);
  }
}

export async function deleteChat(id) {
  await transact('readwrite', (chats, media) => {
    chats.delete(id);
    media.index('chat').openKeyCursor(id).onsuccess = ({ target: { result: cursor } }) => {
      if (!cursor) return;
      media.delete(cursor.primaryKey);
      written.delete(cursor.primaryKey);
      cursor.continue();
    };
  }).catch(() => {});
}
