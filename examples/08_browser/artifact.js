// An artifact's files, from a folder that was picked or from the server: read with progress, and checked against manifest.json.

const SCHEMA_VERSION = 1;
const NEEDED = ["model.onnx", "model.onnx.data", "config.json"];
const OPTIONAL = ["generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "golden.safetensors"];
const REBUILD = "Build the artifact again.";

/** What a user can put right: its message says what is wrong, and how. */
export class ArtifactError extends Error {}

/** Reads files by name from a folder: `files` are what <input webkitdirectory> gave. */
export function folder(files) {
  const known = new Map([...files].map((file) => [file.webkitRelativePath.split("/").slice(1).join("/"), file]));
  return async (name) => {
    const file = known.get(name);
    return file && { stream: file.stream(), bytes: file.size };
  };
}

/** Reads files by name below a URL of this server. */
export function served(url) {
  return async (name) => {
    const response = await fetch(new URL(name, url));
    if (response.status === 404) return undefined;
    if (!response.ok) throw new ArtifactError(`${name}: the server answers ${response.status} ${response.statusText}`);
    return { stream: response.body, bytes: Number(response.headers.get("Content-Length")) };
  };
}

/**
 * The manifest and the checked files, by name. No file is read that the manifest does not list, and none is given that differs from it.
 * `progress(what, done, of)` counts bytes; without `of` there is nothing to count.
 */
export async function openArtifact(source, progress) {
  const manifest = await readManifest(source);
  const names = [...NEEDED, ...OPTIONAL.filter((name) => name in manifest.files)];
  const total = names.reduce((sum, name) => sum + manifest.files[name].bytes, 0);
  const files = {};
  let done = 0;
  for (const name of names) {
    const known = manifest.files[name];
    const bytes = await readFile(source, name, known.bytes, (read) => progress(`reading ${name}`, done + read, total));
    done += known.bytes;
    progress(`checking ${name}`, done, total);
    if ((await sha256(bytes)) !== known.sha256) {
      throw new ArtifactError(`${name} is not the file that was built: its SHA-256 differs from the manifest's. Copy or build it again.`);
    }
    files[name] = bytes;
  }
  return { manifest, files, bytes: total };
}

async function readManifest(source) {
  const found = await source("manifest.json");
  if (!found) throw new ArtifactError("This is no artifact: it has no manifest.json. Choose the directory that `flora-export build` wrote.");
  let manifest;
  try {
    manifest = JSON.parse(await new Response(found.stream).text());
  } catch (error) {
    throw new ArtifactError(`manifest.json is not JSON (${error.message}). ${REBUILD}`);
  }
  const { schema_version: version, backend, cache_tokens: places, files } = manifest ?? {};
  if (version !== SCHEMA_VERSION) {
    throw new ArtifactError(`manifest.json has schema version ${version}, but this page reads ${SCHEMA_VERSION}. ${REBUILD}`);
  }
  if (backend !== "onnxruntime") {
    throw new ArtifactError(`The artifact is for the backend ${backend}; this page runs onnxruntime. Build it with --backend onnxruntime.`);
  }
  if (places) throw new ArtifactError(`The artifact has a static KV cache of ${places} tokens; this page keeps a growing one.`);
  const missing = NEEDED.filter((name) => !Number.isInteger(files?.[name]?.bytes));
  if (missing.length) throw new ArtifactError(`manifest.json lists no ${missing.join(", ")}. ${REBUILD}`);
  return manifest;
}

/** All bytes of a file, as many as the manifest says. */
async function readFile(source, name, size, progress) {
  const found = await source(name);
  if (!found) throw new ArtifactError(`${name} is missing, which the manifest lists. Copy the whole directory, or build it again.`);
  const wrong = (count) => new ArtifactError(`${name} has ${count} bytes, but the manifest says ${size}. Copy or build it again.`);
  if (found.bytes !== size) throw wrong(found.bytes);
  let bytes;
  try {
    bytes = new Uint8Array(size);
  } catch (error) {
    throw new ArtifactError(`${name} has ${gigabytes(size)}, more than this browser holds in one buffer. Build with --precision int4.`);
  }
  let read = 0;
  for (const reader = found.stream.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (read + value.length > size) throw wrong("more");
    bytes.set(value, read);
    read += value.length;
    progress(read);
  }
  if (read !== size) throw wrong(read);
  return bytes;
}

async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

function gigabytes(bytes) {
  return `${(bytes / 1e9).toFixed(1)} GB`;
}

/** A JSON file of the artifact, or {} where it has none. */
export function readJson(artifact, name) {
  return name in artifact.files ? JSON.parse(readText(artifact, name)) : {};
}

export function readText(artifact, name) {
  return new TextDecoder().decode(artifact.files[name]);
}

/** The recorded prompts of golden.safetensors: input_ids, tokens, logits [steps, vocabulary], and in a bank the adapter's slot. */
export function recordedPrompts(artifact) {
  const bytes = artifact.files["golden.safetensors"];
  if (!bytes) return [];
  const length = Number(new DataView(bytes.buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(bytes.subarray(8, 8 + length)));
  const tensor = (name) => {
    if (!(name in header)) return undefined;
    const [start, stop] = header[name].data_offsets;
    const slice = bytes.slice(8 + length + start, 8 + length + stop).buffer; // a copy: typed arrays want their own alignment
    return header[name].dtype === "I64" ? Array.from(new BigInt64Array(slice), Number) : new Float32Array(slice);
  };
  const count = Object.keys(header).filter((name) => name.endsWith(".input_ids")).length;
  return Array.from({ length: count }, (_, i) => ({
    ids: tensor(`prompt.${i}.input_ids`),
    tokens: tensor(`prompt.${i}.tokens`),
    logits: tensor(`prompt.${i}.logits`),
    slot: tensor(`prompt.${i}.adapter`)?.[0],
  }));
}
