// The page: what is loaded, progress, the answer as it comes, and its speed. The work is the worker's.

const MOST_TOKENS = 256;
const $ = (id) => document.getElementById(id);
const parameters = new URLSearchParams(location.search);
let worker, pending, count = 0;

/** Call the worker. `meanwhile` is given what it tells before its result. */
function call(name, given, meanwhile = () => {}) {
  return new Promise((resolve, reject) => {
    const id = ++count;
    pending.set(id, { resolve, reject, meanwhile });
    worker.postMessage({ id, call: name, ...given });
  });
}

/** A new worker for each artifact: the old one's memory goes with it. */
function startWorker() {
  worker?.terminate();
  worker = new Worker("worker.js", { type: "module" });
  const own = (pending = new Map());
  worker.onmessage = ({ data: { id, result, error, ...told } }) => {
    const { resolve, reject, meanwhile } = own.get(id);
    if (result === undefined && error === undefined) return meanwhile(told);
    own.delete(id);
    return error === undefined ? resolve(result) : reject(new Error(error));
  };
  worker.onerror = (event) => {
    for (const { reject } of own.values()) reject(new Error(event.message || "the worker did not start: is `npm ci` done?"));
  };
}

/** Show a state, run some work, and show how it ended. */
async function during(state, work) {
  $("error").hidden = true;
  show(state);
  try {
    const result = await work();
    show("ready");
    return result;
  } catch (error) {
    $("error").textContent = error.message;
    $("error").hidden = false;
    show(state === "loading" ? "empty" : "ready");
    return undefined;
  }
}

function show(state) {
  document.body.dataset.state = state;
  $("loading").hidden = state !== "loading";
  for (const id of ["ask", "replay"]) $(id).disabled = state !== "ready";
  for (const control of document.querySelectorAll(".bar input")) {
    control.disabled = ["answering", "replaying"].includes(state) || (control.value === "webgpu" && !webgpu);
  }
}

let source; // {files} or {url}

function load() {
  if (!source) return undefined;
  for (const id of ["facts", "numbers"]) $(id).hidden = true;
  for (const id of ["answer", "replayed"]) $(id).textContent = "";
  return during("loading", async () => {
    startWorker();
    const runtime = document.querySelector("[name=runtime]:checked").value;
    const facts = await call("load", { ...source, runtime, threads: Number($("threads").value) }, ({ progress }) => {
      const { what, done, of } = progress;
      if (of) Object.assign($("progress"), { value: done, max: of });
      else $("progress").removeAttribute("value");
      $("doing").textContent = of ? `${what} · ${megabytes(done)} of ${megabytes(of)}` : `${what} …`;
    });
    showFacts(facts, runtime);
  });
}

function showFacts({ backend, precision, target, bytes, base, adapters, blocks, built, web }, runtime) {
  const ranks = [...new Set(blocks.map((block) => block.rank))].join(", ");
  const ways = [...Map.groupBy(blocks, (block) => block.fusion)].map(([fusion, some]) => `${some.length} ${fusion}`);
  const rows = {
    base: base.split("/").at(-1),
    artifact: `${backend}, ${target}, ${precision}, ${megabytes(bytes)}`,
    adapter: blocks.length ? `${blocks.length} blocks of rank ${ranks}: ${ways.join(", ")}` : "merged into the base's weights",
    built: `with ONNX Runtime ${built}`,
    runs: `on ${runtime === "wasm" ? `WASM, ${$("threads").value} threads` : "WebGPU"}, onnxruntime-web ${web}`,
    checked: "SHA-256 of each file that was read",
  };
  $("facts").replaceChildren(...Object.entries(rows).map(([name, value]) => {
    const [row, term, definition] = ["div", "dt", "dd"].map((tag) => document.createElement(tag));
    [term.textContent, definition.textContent] = [name, value];
    row.append(term, definition);
    return row;
  }));
  $("facts").hidden = false;
  $("adapter").replaceChildren(...[...adapters, "base"].map((name) => new Option(name)));
  $("adapter").hidden = !adapters.length;
}

function ask() {
  $("answer").textContent = "";
  $("numbers").hidden = true;
  const given = { question: $("question").value, adapter: $("adapter").value, tokens: MOST_TOKENS };
  return during("answering", async () => {
    const answer = await call("ask", given, ({ text, times }) => showAnswer(text, times));
    showAnswer(answer.text, answer.times);
    return answer;
  });
}

/** `times` has the milliseconds of prefill, and of each step after it. */
function showAnswer(text, [first, ...steps]) {
  $("answer").textContent = text;
  const spent = steps.reduce((sum, ms) => sum + ms, 0);
  $("speed").textContent = steps.length ? (1000 * steps.length / spent).toFixed(1) : "–";
  $("first").textContent = `${Math.round(first)} ms`;
  $("count").textContent = steps.length + 1;
  $("numbers").hidden = false;
}

function replay() {
  return during("replaying", async () => {
    const replayed = await call("replay", {});
    const { prompts, same, of, error } = replayed;
    const told = `${same} of ${of} tokens as recorded, logits off by ${error.toExponential(1)} of the largest`;
    $("replayed").textContent = prompts ? told : "there are none: it was built with --no-verify";
    return replayed;
  });
}

function megabytes(bytes) {
  return bytes < 1e5 ? `${(bytes / 1e3).toFixed(0)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}

/** Why WebGPU cannot be chosen, or nothing. */
async function withoutWebgpu() {
  if (!navigator.gpu) return "This browser has no WebGPU.";
  const adapter = await navigator.gpu.requestAdapter().catch(() => null);
  return adapter ? "" : "This browser finds no GPU for WebGPU.";
}

const cores = crossOriginIsolated ? navigator.hardwareConcurrency : 1; // threads share memory, which only isolated pages may
$("threads").value = Math.min(parameters.get("threads") ?? 4, cores);
$("threads").max = cores;
const missing = await withoutWebgpu();
const webgpu = !missing;
$("webgpu-label").classList.toggle("off", !webgpu);
$("webgpu-label").title = missing;
$("why").textContent = [missing, crossOriginIsolated ? "" : "One thread: the server sends no COOP and COEP headers."].join(" ").trim();
if (webgpu && parameters.get("runtime") === "webgpu") document.querySelector("[value=webgpu]").checked = true;

$("folder").onchange = () => {
  source = { files: [...$("folder").files] };
  $("folder").value = ""; // so that the same directory can be opened again
  load();
};
for (const control of document.querySelectorAll("[name=runtime], #threads")) control.onchange = load;
$("form").onsubmit = (event) => {
  event.preventDefault();
  ask();
};
$("replay").onclick = replay;
show("empty");
if (parameters.has("artifact")) {
  source = { url: new URL(parameters.get("artifact"), location.href).href };
  load();
}
window.flora = { ask, call, replay }; // for a test, or the console
