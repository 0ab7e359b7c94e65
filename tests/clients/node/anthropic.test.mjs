// Anthropic's official package for JavaScript.
import assert from "node:assert/strict";
import test from "node:test";
import Anthropic from "@anthropic-ai/sdk";
import { ABOUT, ARGUMENTS, CIRCLE, KEY, LAMP, MODEL, PARAMETERS, SERVER, TOO_LONG, WHAT } from "./asking.mjs";

const client = new Anthropic({ baseURL: SERVER, apiKey: KEY, maxRetries: 0 });
const source = { type: "base64", media_type: "image/png", data: CIRCLE.split(",")[1] };
const asked = (...content) => ({
  model: MODEL, max_tokens: 100, temperature: 0, messages: [{ role: "user", content }],
});

test("a picture is seen and streamed the same", async () => {
  const question = asked({ type: "image", source }, { type: "text", text: WHAT });
  assert.equal((await client.messages.create(question)).content[0].text, "A red circle.");
  const stream = client.messages.stream(question);
  const pieces = [];
  stream.on("text", (piece) => pieces.push(piece));
  assert.equal(await stream.finalText(), "A red circle.");
  assert.equal(pieces.join(""), "A red circle.");
});

test("a tool is called", async () => {
  const tools = [{ name: "set_light", description: ABOUT, input_schema: PARAMETERS }];
  const stream = client.messages.stream({ ...asked({ type: "text", text: LAMP }), tools });
  const [call] = (await stream.finalMessage()).content;
  assert.deepEqual(call.input, ARGUMENTS);
});

test("errors are its own classes", async () => {
  await assert.rejects(client.messages.create({ ...asked(), model: "claude" }), Anthropic.NotFoundError);
  await assert.rejects(client.messages.create(asked({ type: "text", text: TOO_LONG })), (error) => {
    assert.ok(error instanceof Anthropic.BadRequestError);
    assert.match(error.message, /prompt is too long/);
    return true;
  });
});
