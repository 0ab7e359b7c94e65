// What the tests are told by pytest: the server, its keys, and two pictures as data URLs.
export const { SERVER, KEY, SINGLE, CIRCLE, SQUARE } = process.env;
export const V1 = `${SERVER}/v1`;
export const MODEL = "internvl-demo";
export const WHAT = "What is in this picture?";
export const WHICH = "Which picture shows a blue square?";
export const LAMP = "Make the light in the kitchen yellow.";
export const ABOUT = "Set the colour of a lamp";
export const ARGUMENTS = { room: "kitchen", color: "yellow" };
export const DESCRIBE = "Describe it as JSON.";
export const TOO_LONG = "word ".repeat(5000);
export const PARAMETERS = {
  type: "object",
  properties: { room: { type: "string" }, color: { type: "string" } },
  required: ["room", "color"],
  additionalProperties: false,
};

// The first item of a stream of SINGLE's one request, and a way to end it.
export async function occupy() {
  const end = new AbortController();
  const answer = await fetch(`${V1}/completions`, {
    method: "POST",
    headers: { Authorization: `Bearer ${SINGLE}`, "Content-Type": "application/json" },
    body: JSON.stringify({ prompt: "Hello", max_tokens: 4000, ignore_eos: true, stream: true }),
    signal: end.signal,
  });
  await answer.body.getReader().read();
  return () => end.abort();
}
