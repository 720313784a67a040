// An artifact in onnxruntime-web: one prompt, decoded greedily with a KV cache.

import { ArtifactError, readJson } from "./artifact.js";

// Two builds: the one for WebGPU can pause its WASM for the GPU, which makes it twice as large.
const RUNTIMES = {
  wasm: "./node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs",
  webgpu: "./node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs",
};
const BASE_MODEL = -1; // the slot of no adapter
const TYPES = { FLOAT: ["float32", Float32Array], FLOAT16: ["float16", globalThis.Float16Array] };

export class Decoder {
  /** Load the artifact. `runtime` is wasm or webgpu, `threads` those of WASM. */
  static async create(artifact, runtime, threads) {
    if (artifact.manifest.inputs.some((input) => input.dtype === "FLOAT16")) await checkHalf(runtime);
    const ort = await import(RUNTIMES[runtime]);
    ort.env.logLevel = "error";
    ort.env.wasm.numThreads = threads;
    const outputs = artifact.manifest.outputs.map((output) => output.name).filter((name) => name !== "logits");
    const location = runtime === "webgpu" ? "gpu-buffer" : "cpu"; // the cache stays where it is computed
    try {
      const session = await ort.InferenceSession.create(artifact.files["model.onnx"], {
        executionProviders: [runtime],
        logSeverityLevel: 3, // it warns of shapes that the CPU computes
        externalData: [{ path: "model.onnx.data", data: artifact.files["model.onnx.data"] }],
        preferredOutputLocation: Object.fromEntries([["logits", "cpu"], ...outputs.map((name) => [name, location])]),
      });
      return new Decoder(ort, session, artifact);
    } catch (error) {
      throw new ArtifactError(`onnxruntime-web refuses model.onnx: ${error.message ?? error}`);
    }
  }

  constructor(ort, session, { manifest, files }) {
    const config = readJson({ files }, "config.json");
    const ends = readJson({ files }, "generation_config.json").eos_token_id ?? config.eos_token_id ?? [];
    this.ort = ort;
    this.session = session;
    this.version = ort.env.versions.web;
    this.ends = new Set([ends].flat());
    this.context = config.max_position_embeddings ?? Infinity;
    this.cacheInputs = manifest.inputs.filter((input) => input.name.startsWith("past_key_values."));
    this.slot = BASE_MODEL;
    this.cache = {};
  }

  /** Prefill. Returns the logits of the prompt's last token; `slot` is of a bank. */
  async start(ids, slot = BASE_MODEL) {
    this.release();
    this.slot = slot;
    this.length = 0;
    for (const { name, dtype, shape } of this.cacheInputs) {
      const [type, Values] = TYPES[dtype];
      this.cache[name] = new this.ort.Tensor(type, new Values(0), [1, shape[1], 0, shape[3]]);
    }
    return this.#run(ids);
  }

  /** Decode one token. Returns the logits after it. */
  async step(token) {
    return this.#run([token]);
  }

  /** Let go of the KV cache, whose buffers on a GPU nobody else frees. */
  release() {
    for (const tensor of Object.values(this.cache)) tensor.dispose();
    this.cache = {};
  }

  async #run(ids) {
    const [past, total] = [this.length, this.length + ids.length];
    const feeds = {
      input_ids: this.#int64(ids),
      attention_mask: this.#int64(Array(total).fill(1)),
      position_ids: this.#int64(ids.map((_, i) => past + i)),
      adapter_ids: new this.ort.Tensor("int64", [BigInt(this.slot)], [1]),
    };
    const known = Object.entries(feeds).filter(([name]) => this.session.inputNames.includes(name));
    const results = await this.session.run({ ...Object.fromEntries(known), ...this.cache });
    this.release();
    for (const { name } of this.cacheInputs) this.cache[name] = results[name.replace("past_key_values.", "present.")];
    this.length = total;
    const vocabulary = results.logits.dims[2];
    return results.logits.data.subarray(-vocabulary); // [1, tokens, vocabulary]: the last token's
  }

  #int64(values) {
    return new this.ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
  }
}

/** fp16 wants a browser that has such numbers, and on WebGPU a GPU that has. */
async function checkHalf(runtime) {
  const remedy = "Build it with --precision fp32 or int4";
  if (!globalThis.Float16Array) throw new ArtifactError(`The artifact is fp16, and this browser has no Float16Array. ${remedy}, or update it.`);
  if (runtime !== "webgpu" || (await navigator.gpu.requestAdapter())?.features.has("shader-f16")) return;
  throw new ArtifactError(`The artifact is fp16, and this GPU has no shader-f16. ${remedy}, or choose WASM.`);
}

export function argmax(values) {
  let best = 0;
  for (let i = 1; i < values.length; i++) if (values[i] > values[best]) best = i;
  return best;
}
