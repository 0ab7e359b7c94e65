// Vercel's AI SDK with its providers for OpenAI-compatible servers, OpenAI (chat and responses) and Anthropic.
import assert from "node:assert/strict";
import test from "node:test";
import { createAnthropic } from "@ai-sdk/anthropic";
import { createOpenAI } from "@ai-sdk/openai";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, Output, generateText, isStepCount, streamText, tool } from "ai";
import { z } from "zod";
import {
  ABOUT, ARGUMENTS, CIRCLE, DESCRIBE, KEY, LAMP, MODEL, SQUARE, TOO_LONG, V1, WHAT, WHICH,
} from "./asking.mjs";

const options = { baseURL: V1, apiKey: KEY };
const models = {
  compatible: createOpenAICompatible({
    name: "internvl", includeUsage: true, supportsStructuredOutputs: true, ...options,
  })(MODEL),
  chat: createOpenAI(options).chat(MODEL),
  responses: createOpenAI(options).responses(MODEL),
  messages: createAnthropic(options)(MODEL),
};
const Seen = z.object({ color: z.string(), shape: z.string() });
const shown = (url) => ({ type: "image", image: url.split(",")[1], mediaType: "image/png" });
const text = (words) => ({ type: "text", text: words });
const asked = (model, ...content) => ({
  model, temperature: 0, maxOutputTokens: 100, maxRetries: 0, messages: [{ role: "user", content }],
});

for (const [name, model] of Object.entries(models)) {
  test(`${name}: pictures are seen and streamed the same`, async () => {
    const question = asked(model, shown(CIRCLE), text(WHAT));
    const whole = await generateText(question);
    assert.equal(whole.text, "A red circle.");
    const stream = streamText(question);
    const pieces = await Array.fromAsync(stream.textStream);
    assert.equal(pieces.join(""), "A red circle.");
    assert.ok(pieces.length > 1);
    assert.ok((await stream.usage).inputTokens);
    assert.equal((await stream.usage).inputTokens, whole.usage.inputTokens);
    const two = await generateText(asked(model, shown(CIRCLE), shown(SQUARE), text(WHICH)));
    assert.equal(two.text, "Picture 2.");
  });

  for (const choice of ["auto", "required", { type: "tool", toolName: "set_light" }])
    test(`${name}: a tool is called and its result understood: ${JSON.stringify(choice)}`, async () => {
      const calls = [];
      const set_light = tool({
        description: ABOUT,
        inputSchema: z.object({ room: z.string(), color: z.string() }),
        execute: async (input) => (calls.push(input), { ok: true }),
      });
      const stream = streamText({
        ...asked(model, text(LAMP)),
        tools: { set_light },
        toolChoice: choice,
        prepareStep: ({ stepNumber }) => (stepNumber ? { toolChoice: "auto" } : {}),
        stopWhen: isStepCount(2),
      });
      assert.ok(await stream.text);
      assert.deepEqual(calls, [ARGUMENTS]);
    });

  test(`${name}: an answer keeps to a zod object`, async () => {
    const question = asked(model, shown(CIRCLE), text(DESCRIBE));
    const { output } = await generateText({ ...question, output: Output.object({ schema: Seen }) });
    assert.ok(Seen.parse(output));
  });

  test(`${name}: errors have the server's status and words`, async () => {
    await assert.rejects(generateText(asked(model, text(TOO_LONG))), (error) => {
      assert.ok(APICallError.isInstance(error));
      assert.equal(error.statusCode, 400);
      assert.match(error.message, /maximum context length is 4096/);
      return true;
    });
  });
}

test("a limit of time is kept", async () => {
  const abortSignal = AbortSignal.timeout(1);
  await assert.rejects(generateText({ ...asked(models.chat, text("Hello!")), abortSignal }));
});
