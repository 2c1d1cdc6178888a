// The playground: plain modules, no libraries. Everything it does goes through the public HTTP API.

const byId = (id) => document.getElementById(id);
const state = { model: null, abort: null, lastScored: null };

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function makeSvg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

function say(id, text, isError = false) {
  byId(id).textContent = text;
  byId(id).classList.toggle("error", isError);
}

function headers(extra = {}) {
  const key = byId("key").value;
  return key ? { ...extra, authorization: `Bearer ${key}` } : extra;
}

async function answered(response) {
  if (response.ok) return response;
  if (response.status === 401) byId("key-field").hidden = false;
  const body = await response.json().catch(() => null);
  throw new Error(body?.error?.message ?? `the endpoint answered ${response.status}`);
}

// --- which model ---------------------------------------------------------------------------------

async function loadModel(chosen) {
  try {
    const list = await (await answered(await fetch("v1/models", { headers: headers() }))).json();
    const id = chosen ?? list.data[0].id;
    state.model = await (await answered(await fetch(`v1/models/${id}`, { headers: headers() }))).json();
    showModel(list.data.map((entry) => entry.id));
  } catch (error) {
    byId("facts").textContent = `No model: ${error.message}`;
    byId("facts").classList.add("error");
  }
}

function showModel(ids) {
  const model = state.model;
  byId("facts").classList.remove("error");
  const version = model.version ? `version ${model.version}, ` : "";
  byId("facts").textContent =
    `${model.id}, ${version}${model.width}×${model.height} pixels, digest ${model.digest.slice(0, 12)}`;
  fill("model", ids.map((id) => [id, id]), model.id);
  fill("sampler", Object.keys(model.samplers).map((name) => [name, name]), model.defaults.sampler);
  fill("estimator", Object.keys(model.estimators).map((name) => [name, name]), "vlb");
  const classes = model.class_names.map((name, index) => [String(index), name]);
  const none = [["-1", model.class_names.length ? "no class" : "this model has none"]];
  fill("class", [...(classes.length ? [["each", "each in turn"]] : []), ...none, ...classes]);
  fill("score-class", [...none, ...classes]);
  byId("class").disabled = byId("score-class").disabled = !classes.length;
  document.documentElement.style.setProperty("--aspect", model.width / model.height);
  noteGuidance();
  byId("steps").value = model.defaults.steps;
  byId("steps").max = model.limits.steps;
  byId("n").max = model.limits.images;
  byId("n").value = Math.min(classes.length >= 2 && classes.length <= 20 ? 2 * classes.length : 16, model.limits.images);
  noteSampler();
}

function fill(id, options, chosen) {
  byId(id).replaceChildren(...options.map(([value, text]) => make("option", { value, textContent: text })));
  if (chosen !== undefined) byId(id).value = chosen;
}

function noteGuidance() {
  const model = state.model;
  if (!model) return;
  const unclassed = model.guided === "by class" && byId("class").value === "-1";
  const why = !model.guided ? "This model has nothing to guide from: it does not know a prediction without a class."
    : unclassed ? "Choose a class: without one there is nothing to guide towards." : "";
  byId("guidance").disabled = Boolean(why);
  byId("guidance").title = why;
  if (why) byId("guidance").value = 1;
}

function noteSampler() {
  const sampler = state.model?.samplers[byId("sampler").value];
  if (!sampler) return;
  byId("sampler-note").textContent =
    `${sampler.stochastic ? "Adds noise on its way" : "Deterministic"}, levels by the grid ${sampler.grid}.`;
}

// --- making images -------------------------------------------------------------------------------

function asked() {
  const n = Number(byId("n").value);
  const classes = state.model.class_names.length;
  const chosen = byId("class").value;
  const labels = chosen === "each" ? Array.from({ length: n }, (_, index) => index % classes) : Number(chosen);
  const body = {
    model: state.model.id,
    n,
    sampler: byId("sampler").value,
    steps: Number(byId("steps").value),
    seed: Number(byId("seed").value),
  };
  if (classes && chosen !== "-1") body.labels = labels;
  if (Number(byId("guidance").value) !== 1) body.guidance = Number(byId("guidance").value);
  return body;
}

async function* sentEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.split("\n").find((line) => line.startsWith("data: "));
      if (data) yield JSON.parse(data.slice(6));
    }
  }
}

async function generate(event) {
  event.preventDefault();
  if (!state.model) return;
  state.abort?.abort();
  const abort = (state.abort = new AbortController());
  const body = asked();
  busy(true);
  prepareTiles(body);
  say("status", "Waiting for the first evaluation…");
  try {
    const response = await answered(await fetch("v1/images/generations", {
      method: "POST",
      headers: headers({ "content-type": "application/json" }),
      body: JSON.stringify({ ...body, stream: true, partial_images: 200 }),
      signal: abort.signal,
    }));
    let complete = false;
    for await (const sent of sentEvents(response)) {
      if (sent.error) throw new Error(sent.error.message);
      showImages(sent.data);
      complete = sent.type === "image_generation.completed";
      if (complete) offerImages();
      if (complete) showLineage(sent);
      else showProgress(sent);
    }
    if (!complete) throw new Error("the answer broke off; ask again with the same seed");
  } catch (error) {
    if (error.name === "AbortError") say("status", "Stopped.");
    else say("status", error.message, true);
  } finally {
    if (state.abort === abort) busy(false);
  }
}

function busy(on) {
  byId("stop").disabled = !on;
  byId("images").setAttribute("aria-busy", String(on));
  if (on) byId("progress").value = 0;
}

function prepareTiles(body) {
  const small = Math.max(state.model.width, state.model.height) < 128;
  const tiles = Array.from({ length: body.n }, (_, index) => {
    const label = Array.isArray(body.labels) ? body.labels[index] : body.labels ?? -1;
    const name = label >= 0 ? state.model.class_names[label] : "no class";
    const image = make("img", { alt: `Image ${index + 1}, ${label >= 0 ? `class ${name}` : name}`, className: small ? "pixelated" : "" });
    image.src = "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=";
    const button = make("button", { type: "button", title: `Score this image (${name})` }, image, make("small", { textContent: name }));
    button.addEventListener("click", () => scoreTile(image, label));
    const save = make("a", { className: "save", textContent: "Save", download: `${state.model.id}-seed${body.seed}-${index}.png` });
    save.setAttribute("aria-label", `Save image ${index + 1}`);
    return make("li", {}, button, save);
  });
  byId("images").replaceChildren(...tiles);
  byId("lineage").replaceChildren();
}

function showImages(data) {
  const images = byId("images").querySelectorAll("img");
  for (const item of data) images[item.index].src = `data:image/png;base64,${item.b64_json}`;
}

function offerImages() {
  for (const tile of byId("images").children) tile.querySelector("a").href = tile.querySelector("img").src;
}

function showProgress(sent) {
  byId("progress").value = sent.evaluations / sent.expected_evaluations;
  say("status", `Evaluation ${sent.evaluations} of ${sent.expected_evaluations}`);
}

function showLineage(answer) {
  byId("progress").value = 1;
  const seconds = (answer.queued_s + answer.run_s).toFixed(2);
  say("status", `${answer.data.length} images, ${answer.evaluations} network evaluations each, ${seconds} s`);
  const facts = {
    Model: answer.model + (answer.model_version ? `, version ${answer.model_version}` : ""),
    Digest: answer.model_digest.slice(0, 16),
    Seed: answer.seed,
    Sampler: `${answer.sampler}, ${answer.steps} steps`,
    "Row evaluations": answer.row_evaluations,
    Trace: answer.trace_id,
  };
  byId("lineage").replaceChildren(
    ...Object.entries(facts).map(([name, value]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))),
  );
}

// --- scoring -------------------------------------------------------------------------------------

async function scoreTile(image, label) {
  const bytes = Uint8Array.from(atob(image.src.split(",")[1]), (letter) => letter.charCodeAt(0));
  byId("score-class").value = String(label);
  await score([new File([bytes], `${image.alt.split(",")[0].toLowerCase().replace(" ", "-")}.png`, { type: "image/png" })]);
  const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
  byId("score-title").scrollIntoView({ behavior: still ? "auto" : "smooth", block: "start" });
}

async function score(files) {
  if (!state.model || !files.length) return;
  const form = new FormData();
  for (const file of files) form.append("images", file, file.name);
  form.append("estimator", byId("estimator").value);
  form.append("resize", byId("resize").value);
  const label = Number(byId("score-class").value);
  if (label >= 0) form.append("labels", String(label));
  state.lastScored = files[0].name;
  say("score-status", `Scoring ${files.length === 1 ? files[0].name : `${files.length} images`}…`);
  try {
    const response = await fetch("v1/likelihood", { method: "POST", headers: headers(), body: form });
    const answer = await (await answered(response)).json();
    const seconds = (answer.queued_s + answer.run_s).toFixed(2);
    say("score-status", `Scored by ${answer.estimator} with ${answer.model}${answer.model_version ? ` version ${answer.model_version}` : ""} in ${seconds} s`);
    const results = await Promise.all(answer.data.map((item) => result(item, files[item.index], answer)));
    byId("scores").prepend(...results);
  } catch (error) {
    say("score-status", error.message, true);
  }
}

async function result(item, file, answer) {
  const source = await readAsDataUrl(file);
  const small = Math.max(state.model.width, state.model.height) < 128;
  const image = make("img", { src: source, alt: file.name, className: small ? "pixelated" : "" });
  const dimensions = state.model.width * state.model.height * state.model.channels;
  const bits = (nats) => nats / (dimensions * Math.LN2);
  const spread = item.standard_error === null ? "" : ` ± ${item.standard_error.toFixed(3)}`;
  const rows = Object.entries(item.parts_nats).map(([name, nats], index) => {
    const swatch = make("span", { className: "swatch" });
    swatch.style.background = `var(--part-${index % 5})`;
    return make("tr", {}, make("th", { scope: "row" }, swatch, name), make("td", { textContent: bits(nats).toFixed(3) }));
  });
  const name = item.label >= 0 ? `${file.name}, class ${state.model.class_names[item.label]}` : file.name;
  const numbers = make("div", {},
    make("div", { className: "muted", textContent: `${name} · ${answer.estimator}` }),
    make("strong", { textContent: item.bits_per_dim.toFixed(3) }), ` bits/dim${spread}`,
    make("table", {}, make("caption", { className: "muted", textContent: "Its parts, bits/dim" }), make("tbody", {}, ...rows)),
    make("div", { className: "muted", textContent: `${item.nats.toFixed(1)} nats, ${item.evaluations} network evaluations` }));
  return make("article", { className: "result" }, image, numbers, charts(item, answer.estimator, bits));
}

function charts(item, estimator, bits) {
  const figure = make("figure", {}, partsBar(item.parts_nats, bits));
  if (Object.values(item.parts_nats).some((nats) => nats < 0)) {
    figure.append(make("figcaption", { textContent: "Negative parts lie left of the line." }));
  }
  const held = state.model.held_out[estimator];
  if (!held) {
    figure.append(make("figcaption", { textContent: "The model's card has no held-out scores by this estimator." }));
    return figure;
  }
  if (item.percentile === null) {
    figure.append(make("figcaption", { textContent: "Choose its class to see its place: held-out images were scored with theirs." }));
    return figure;
  }
  figure.append(histogram(held, item.bits_per_dim), make("figcaption", {
    textContent: `Of ${held.count} held-out images ${item.percentile.toFixed(1)}% have fewer bits/dim.`,
  }));
  return figure;
}

function partsBar(parts, bits) {
  const values = Object.values(parts).map(bits);
  const low = values.filter((value) => value < 0).reduce((a, b) => a + b, 0);
  const high = values.filter((value) => value > 0).reduce((a, b) => a + b, 0);
  const x = (value) => (400 * (value - low)) / (high - low || 1);
  let up = 0;
  let down = 0;
  const bars = values.map((value, index) => {
    const start = value < 0 ? (down += value) : up;
    if (value > 0) up += value;
    const bar = makeSvg("rect", { x: x(start), y: 2, width: Math.abs(x(value) - x(0)), height: 18 });
    bar.style.fill = `var(--part-${index % 5})`;
    return bar;
  });
  const zero = makeSvg("line", { x1: x(0), x2: x(0), y1: 0, y2: 22, stroke: "currentColor" });
  return makeSvg("svg", { viewBox: "-2 0 404 24", "aria-hidden": "true" }, ...bars, zero);
}

function histogram(held, value) {
  const first = Math.min(held.edges[0], value);
  const last = Math.max(held.edges[held.edges.length - 1], value);
  const x = (bits) => 10 + (380 * (bits - first)) / (last - first || 1);
  const highest = Math.max(...held.counts);
  const bars = held.counts.map((count, index) => {
    const height = (80 * count) / highest;
    const width = Math.max(x(held.edges[index + 1]) - x(held.edges[index]) - 0.5, 0.5);
    return makeSvg("rect", { class: "bar", x: x(held.edges[index]), y: 90 - height, width, height });
  });
  const label = (bits, anchor) => makeSvg("text", { x: x(bits), y: 104, "text-anchor": anchor }, bits.toFixed(2));
  return makeSvg("svg", { viewBox: "0 0 400 108", role: "img", "aria-label": `This image at ${value.toFixed(3)} bits/dim among the held-out images` },
    ...bars, makeSvg("line", { class: "mark", x1: x(value), x2: x(value), y1: 4, y2: 92 }), label(first, "start"), label(last, "end"));
}

function readAsDataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Error(`cannot read ${file.name}`));
    reader.readAsDataURL(file);
  });
}

// --- copy as curl --------------------------------------------------------------------------------

const quoted = (text) => `'${text.replaceAll("'", "'\\''")}'`;
const bearer = () => (byId("key").value ? ' -H "authorization: Bearer $KEY"' : "");

async function copy(text, status) {
  try {
    await navigator.clipboard.writeText(text);
    say(status, "Copied.");
  } catch {
    say(status, text); // no clipboard outside a secure page: show it to be selected
  }
}

function copyGeneration() {
  if (!state.model) return;
  const url = new URL("v1/images/generations", location.href);
  copy(`curl ${quoted(String(url))}${bearer()} -H 'content-type: application/json' -d ${quoted(JSON.stringify(asked()))}`, "status");
}

function copyScore() {
  const url = new URL("v1/likelihood", location.href);
  const label = Number(byId("score-class").value);
  const fields = [`images=@${state.lastScored ?? "image.png"}`, `estimator=${byId("estimator").value}`, `resize=${byId("resize").value}`];
  if (label >= 0) fields.push(`labels=${label}`);
  copy(`curl ${quoted(String(url))}${bearer()} ${fields.map((field) => `-F ${quoted(field)}`).join(" ")}`, "score-status");
}

// --- wiring --------------------------------------------------------------------------------------

byId("form").addEventListener("submit", generate);
byId("stop").addEventListener("click", () => state.abort?.abort());
byId("dice").addEventListener("click", () => { byId("seed").value = crypto.getRandomValues(new Uint32Array(1))[0]; });
byId("curl").addEventListener("click", copyGeneration);
byId("score-curl").addEventListener("click", copyScore);
byId("sampler").addEventListener("change", noteSampler);
byId("class").addEventListener("change", noteGuidance);
byId("key").addEventListener("change", () => loadModel());
byId("model").addEventListener("change", (event) => loadModel(event.target.value));
byId("file").addEventListener("change", async (event) => { await score([...event.target.files]); event.target.value = ""; });
const drop = byId("drop");
for (const type of ["dragenter", "dragover"]) drop.addEventListener(type, (event) => { event.preventDefault(); drop.classList.add("over"); });
for (const type of ["dragleave", "drop"]) drop.addEventListener(type, () => drop.classList.remove("over"));
drop.addEventListener("drop", (event) => { event.preventDefault(); score([...event.dataTransfer.files]); });
loadModel();
