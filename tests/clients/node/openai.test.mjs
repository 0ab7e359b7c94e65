// OpenAI's official package for JavaScript, over chat completions and responses.
import assert from "node:assert/strict";
import test from "node:test";
import OpenAI from "openai";
import { zodResponseFormat, zodTextFormat } from "openai/helpers/zod";
import { z } from "zod";
import {
  ABOUT, ARGUMENTS, CIRCLE, DESCRIBE, KEY, LAMP, MODEL, PARAMETERS, SINGLE, SQUARE, TOO_LONG, V1, WHAT, WHICH,
  occupy,
} from "./asking.mjs";

const client = new OpenAI({ baseURL: V1, apiKey: KEY, maxRetries: 0 });
const text = (words) => ({ type: "text", text: words });
const shown = (url) => ({ type: "image_url", image_url: { url } });
const asked = (...content) => ({ model: MODEL, temperature: 0, messages: [{ role: "user", content }] });
const tool = { type: "function", function: { name: "set_light", description: ABOUT, parameters: PARAMETERS } };
const Seen = z.object({ color: z.string(), shape: z.string() });

test("pictures are seen and streamed the same", async () => {
  const question = asked(shown(CIRCLE), text(WHAT));
  const whole = await client.chat.completions.create(question);
  assert.equal(whole.choices[0].message.content, "A red circle.");
  const chunks = [];
  const options = { stream: true, stream_options: { include_usage: true } };
  for await (const chunk of await client.chat.completions.create({ ...question, ...options })) chunks.push(chunk);
  const pieces = chunks.map((chunk) => chunk.choices[0]?.delta.content ?? "");
  assert.equal(pieces.join(""), "A red circle.");
  assert.equal(chunks.at(-1).usage.prompt_tokens, whole.usage.prompt_tokens);
  const two = await client.chat.completions.create(asked(shown(CIRCLE), shown(SQUARE), text(WHICH)));
  assert.equal(two.choices[0].message.content, "Picture 2.");
});

for (const choice of ["auto", "required", { type: "function", function: { name: "set_light" } }])
  test(`a tool is called: ${JSON.stringify(choice)}`, async () => {
    const options = { ...asked(text(LAMP)), tools: [tool], tool_choice: choice };
    const stream = client.chat.completions.stream(options);
    const pieces = [];
    stream.on("tool_calls.function.arguments.delta", (event) => pieces.push(event.arguments_delta));
    const message = (await stream.finalChatCompletion()).choices[0].message;
    const [call] = message.tool_calls;
    assert.deepEqual(JSON.parse(call.function.arguments), ARGUMENTS);
    assert.equal(pieces.join(""), call.function.arguments);
    const result = { role: "tool", tool_call_id: call.id, content: '{"ok": true}' };
    const messages = [...options.messages, message, result];
    const said = await client.chat.completions.create({ ...options, tool_choice: "auto", messages });
    assert.ok(said.choices[0].message.content);
  });

test("its own loop runs a tool", async () => {
  const calls = [];
  const parse = JSON.parse;
  const set_light = (input) => (calls.push(input), '{"ok": true}');
  const described = { ...tool.function, function: set_light, parse };
  const runner = client.chat.completions.runTools({
    ...asked(text(LAMP)), tools: [{ type: "function", function: described }],
  });
  assert.ok(await runner.finalContent());
  assert.deepEqual(calls, [ARGUMENTS]);
});

test("answers keep to a zod object", async () => {
  const question = asked(shown(CIRCLE), text(DESCRIBE));
  const response_format = zodResponseFormat(Seen, "seen");
  const chat = await client.chat.completions.parse({ ...question, response_format });
  assert.ok(Seen.parse(chat.choices[0].message.parsed));
  const input = [{ role: "user", content: [
    { type: "input_image", image_url: CIRCLE, detail: "auto" }, { type: "input_text", text: DESCRIBE },
  ] }];
  const format = { format: zodTextFormat(Seen, "seen") };
  const response = await client.responses.parse({ model: MODEL, temperature: 0, input, text: format });
  assert.ok(Seen.parse(response.output_parsed));
});

test("choices, stops and log-probabilities", async () => {
  const options = { n: 2, stop: [" circ"], logprobs: true, top_logprobs: 2 };
  const answer = await client.chat.completions.create({ ...asked(shown(CIRCLE), text(WHAT)), ...options });
  assert.deepEqual(answer.choices.map((choice) => choice.message.content), ["A red", "A red"]);
  assert.equal(answer.choices[1].logprobs.content[0].top_logprobs.length, 2);
});

test("responses are streamed and gone on with", async () => {
  const content = [{ type: "input_image", image_url: CIRCLE, detail: "auto" }, { type: "input_text", text: WHAT }];
  const stream = client.responses.stream({ model: MODEL, temperature: 0, input: [{ role: "user", content }] });
  const pieces = [];
  stream.on("response.output_text.delta", (event) => pieces.push(event.delta));
  const response = await stream.finalResponse();
  assert.equal(pieces.join(""), "A red circle.");
  assert.equal(response.output_text, "A red circle.");
  const more = { model: MODEL, temperature: 0, input: "What colour is it?", previous_response_id: response.id };
  assert.match((await client.responses.create(more)).output_text, /red/i);
});

test("errors are its own classes", async () => {
  const create = (options, init = {}) =>
    client.withOptions(init).chat.completions.create({ ...asked(text("Hello!")), ...options });
  await assert.rejects(create({}, { apiKey: "sk-wrong" }), OpenAI.AuthenticationError);
  await assert.rejects(create({ model: "gpt" }), { constructor: OpenAI.NotFoundError, code: "model_not_found" });
  await assert.rejects(create(asked(text(TOO_LONG))), {
    constructor: OpenAI.BadRequestError, code: "context_length_exceeded", param: "messages",
  });
  await assert.rejects(create({}, { timeout: 1 }), OpenAI.APIConnectionTimeoutError);
  await assert.rejects(client.embeddings.create({ model: MODEL, input: "x" }), OpenAI.NotFoundError);
});

test("a limit is waited for as the server says", async () => {
  const one = client.withOptions({ apiKey: SINGLE });
  const release = await occupy();
  await assert.rejects(one.chat.completions.create(asked(text("Hello!"))), OpenAI.RateLimitError);
  const began = performance.now();
  const waits = one.withOptions({ maxRetries: 1 }).chat.completions.create(asked(text("Hello!")));
  setTimeout(release, 300);
  assert.ok((await waits).choices[0].message.content);
  assert.ok(performance.now() - began >= 1000); // Retry-After: 1
});

test("a stream that is left ends", async () => {
  const one = client.withOptions({ apiKey: SINGLE, maxRetries: 5 });
  const long = { ...asked(text("Hello!")), ignore_eos: true, max_tokens: 4000, stream: true };
  for await (const _ of await one.chat.completions.create(long)) break;
  assert.ok((await one.chat.completions.create(asked(text("Hello!")))).choices.length);
});
