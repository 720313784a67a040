// Everything that takes time, off the page's own thread: the page stays alive while a token is computed. One worker, one artifact.
//
// In: {id, call, ...arguments}. Out: {id, result} or {id, error}, and meanwhile {id, progress} of loading, {id, text, times} of an answer.

import { ArtifactError, folder, openArtifact, recordedPrompts, served } from "./artifact.js";
import { argmax, Decoder } from "./decoder.js";
import { Chat } from "./chat.js";

let artifact, chat, decoder;

const calls = {
  /** Open an artifact from `files` or `url`. Returns what the page shows of it. */
  async load({ files, url, runtime, threads }, tell) {
    const progress = (what, done, of) => tell({ progress: { what, done, of } });
    artifact = await openArtifact(files ? folder(files) : served(url), progress);
    progress("starting ONNX Runtime");
    decoder = await Decoder.create(artifact, runtime, threads);
    delete artifact.files["model.onnx.data"]; // the session has its own copy
    chat = Chat.of(artifact);
    const { manifest, bytes } = artifact;
    const { backend, precision, target, versions, blocks, bank, base } = manifest;
    const adapters = bank ? bank.names.filter(Boolean) : [];
    return { backend, precision, target, bytes, base: base.name, adapters, blocks, built: versions.onnxruntime, web: decoder.version };
  },

  /** Answer a question, piece by piece. */
  async ask({ question, adapter, tokens }, tell) {
    if (!chat) throw new ArtifactError("The artifact has no tokenizer.json, so this page cannot ask it in words.");
    const ids = chat.encode(question);
    let text = "";
    const done = await decode(ids, tokens, slotOf(adapter), true, (answer, times) => {
      const longer = chat.decode(answer);
      if (!longer.endsWith("\ufffd")) text = longer; // half a character: wait for the rest
      tell({ text, times });
    });
    return { ...done, text: chat.decode(done.tokens), prompt: ids };
  },

  /** Decode after given token ids. Returns {tokens, times}: milliseconds of prefill, and of each step. */
  decode: ({ ids, tokens, adapter, stop = true }) => decode(ids, tokens, slotOf(adapter), stop, () => {}),

  /** Replay the artifact's recorded prompts: how many of its greedy tokens come again, and how far the logits are off, of the largest. */
  async replay() {
    const prompts = recordedPrompts(artifact);
    let [same, of, error] = [0, 0, 0];
    for (const { ids, tokens, logits, slot } of prompts) {
      let got = await decoder.start(ids, slot);
      const scale = Math.max(1, logits.reduce((largest, value) => Math.max(largest, Math.abs(value)), 0));
      for (let i = 0; i < tokens.length; i++) {
        same += argmax(got) === tokens[i];
        of += 1;
        for (let k = 0; k < got.length; k++) error = Math.max(error, Math.abs(got[k] - logits[i * got.length + k]) / scale);
        if (i + 1 < tokens.length) got = await decoder.step(tokens[i]);
      }
    }
    return { prompts: prompts.length, same, of, error };
  },
};

/** Greedy tokens, up to `most`, the context's end, or with `stop` an end token, which is not among them. */
async function decode(ids, most, slot, stop, each) {
  if (!ids.length || ids.length >= decoder.context) {
    throw new ArtifactError(`The prompt has ${ids.length} tokens: it must have at least 1, and leave room in a context of ${decoder.context}.`);
  }
  const [tokens, times] = [[], []];
  for (let token; tokens.length < Math.min(most, decoder.context - ids.length); tokens.push(token), each(tokens, times)) {
    const started = performance.now();
    token = argmax(await (tokens.length ? decoder.step(tokens.at(-1)) : decoder.start(ids, slot)));
    times.push(performance.now() - started);
    if (stop && decoder.ends.has(token)) break;
  }
  decoder.release();
  return { tokens, times };
}

/** The slot of a bank's adapter by its name; other graphs do not ask. */
function slotOf(name) {
  const names = artifact.manifest.bank?.names;
  if (!names || !name || name === "base") return undefined;
  if (!names.includes(name)) throw new ArtifactError(`There is no adapter ${name}; there are ${names.filter(Boolean).join(", ")} and base.`);
  return names.indexOf(name);
}

let last = Promise.resolve(); // one call at a time: a session does not run twice at once

onmessage = ({ data: { id, call, ...given } }) => {
  const tell = (content) => postMessage({ id, ...content });
  last = last.then(async () => {
    try {
      tell({ result: await calls[call](given, tell) });
    } catch (error) {
      tell({ error: error instanceof ArtifactError ? error.message : `${error.name ?? "Error"}: ${error.message ?? error}` });
    }
  });
};
