// Pictures and videos: which files are some, how they are shown, and how they are sent.

import { h } from './dom.js';

const BY_NAME = { image: /\.(heic|heif|avif|jxl|jp2|tiff?|dds|qoi|psd)$/i, video: /\.(mkv|avi|flv|ts|m2ts|wmv|mov|mp4|webm)$/i };

/** `image`, `video`, or null for what is neither. The server has the last word: it reads the content. */
export function kindOf(file) {
  const kind = file.type.split('/')[0];
  if (kind === 'image' || kind === 'video') return kind;
  return Object.keys(BY_NAME).find((each) => BY_NAME[each].test(file.name)) ?? null;
}

const urls = new WeakMap();

/** An address that shows the blob, for as long as the page is there. */
export function urlOf(blob) {
  if (!urls.has(blob)) urls.set(blob, URL.createObjectURL(blob));
  return urls.get(blob);
}

/** Bytes of pictures and videos as they are sent. */
export const sent = (media) => media.reduce((sum, { blob }) => sum + Math.ceil(blob.size / 3) * 4, 0);

const data = new WeakMap();

/** The same as a `data:` URL, which can be sent. */
export function dataUrl({ blob, kind }) {
  if (!data.has(blob)) {
    data.set(blob, new Promise((resolve, reject) => {
      const reader = new FileReader();
      reader.onerror = () => reject(reader.error);
      // The server does not go by the type, but wants to know which of the two it is.
      reader.onload = () => resolve(reader.result.replace(/^data:[^,]*,/, `data:${kind}/${subtype(blob)};base64,`));
      reader.readAsDataURL(blob);
    }));
  }
  return data.get(blob);
}

const subtype = (blob) => /^(?:image|video)\/([\w.+-]+)$/.exec(blob.type)?.[1] ?? 'unknown';

/** What shows it; its name where the browser cannot. */
export function preview({ blob, kind, name }, controls = false) {
  const other = () => shown.replaceWith(h('span', { class: 'file', title: name }, name.split('.').at(-1).toUpperCase()));
  const shown = kind === 'video'
    ? h('video', { src: urlOf(blob), muted: true, preload: 'metadata', playsinline: true, controls, 'aria-label': name, onerror: other })
    : h('img', { src: urlOf(blob), alt: name, onerror: other, draggable: 'false' });
  return shown;
}
