// Captions pictures as demo.py does: the same pixels, the same beam search. A worker that page.js
// starts, so that the page stays awake.
//
// It is sent { picture, beamSize, number } and sends { loaded, total } while it loads the model,
// { model } when it is ready, { number, caption } and { number, failure }; { failure } without a
// number ends it.

const RUNTIME = "runtime";  // of onnxruntime-web
const MODEL = "model";  // what deploy/export.py has written
const CACHE = "show-attend-tell";
const FORMAT_VERSION = 1;  // of model.json

/** What the page has to tell its user: page.js has a sentence for each `reason`. */
class Failure extends Error {
  constructor(reason, what = "") {
    super(`${reason}: ${what}`);
    this.told = { reason, what };
  }
}


// ------------------------------------------------------------------------------------------------
// Pixels

const PRECISION = 22;  // bits of a weight, as in Pillow's Resample.c
const STRIP = 256;  // rows read at once: a phone's canvas may not hold its camera's picture

/** A picture's pixels, the same as datasets.read_image: uint8 (size, size, 3). */
async function readImage(blob, size) {
  const options = { colorSpaceConversion: "none", premultiplyAlpha: "none" };
  const bitmap = await createImageBitmap(blob, options).catch(error => {
    throw new Failure("picture", error.message);
  });
  const start = new Uint8Array(await blob.slice(0, 2).arrayBuffer());
  const isJpeg = start[0] === 0xff && start[1] === 0xd8;
  const reduction = isJpeg ? reductionOf(bitmap, size) : 1;
  const pixels = resize(bitmap, size, reduction);
  bitmap.close();
  return pixels;
}

/** By how much Python has a large JPEG reduced while it is decoded: datasets.draft_size. */
function reductionOf({ width, height }, size) {
  const reach = Math.min(width, height) / size;
  const reduction = Math.max(Math.floor(reach / 2), reach >= 2.6 ? 2 : 1);
  return [8, 4, 2, 1].find(possible => possible <= reduction);
}

/** Pillow's bilinear resize, to the bit: across, rounded to 8 bits, then down. */
function resize(bitmap, size, reduction) {
  const width = Math.ceil(bitmap.width / reduction);
  const height = Math.ceil(bitmap.height / reduction);
  const across = triangles(bitmap.width / reduction, width, size);
  const down = triangles(bitmap.height / reduction, height, size);

  const wide = new Uint8Array(height * size * 3);
  for (const [top, strip] of strips(bitmap, reduction)) {
    for (let y = 0; y < strip.length / width / 4; y++) {
      for (let channel = 0; channel < 3; channel++) {
        weigh(across, strip, 4 * y * width + channel, 4, wide, 3 * (top + y) * size + channel, 3);
      }
    }
  }
  const pixels = new Uint8Array(size * size * 3);
  for (let column = 0; column < 3 * size; column++) {
    weigh(down, wide, column, 3 * size, pixels, column, 3 * size);
  }
  return pixels;
}

/** For each of `size` outputs the first input it is made of, and their weights: a triangle that is
 *  as wide as two outputs. `length`, which may be a fraction, is what they cover of `count` inputs.
 */
function triangles(length, count, size) {
  const scale = length / size;
  const reach = Math.max(scale, 1);
  return Array.from({ length: size }, (_, output) => {
    const centre = (output + 0.5) * scale;
    const first = Math.max(Math.trunc(centre - reach + 0.5), 0);
    const last = Math.min(Math.trunc(centre + reach + 0.5), count);
    const weights = [];
    for (let input = first; input < last; input++) {
      const distance = Math.abs((input - centre + 0.5) * (1 / reach));
      weights.push(Math.max(1 - distance, 0));
    }
    const sum = weights.reduce((a, b) => a + b);
    const whole = weights.map(weight => Math.trunc(0.5 + weight / sum * 2 ** PRECISION));
    return { first, weights: whole };
  });
}

/** One line of values, `step` apart, by its triangles. */
function weigh(triangles, from, start, step, to, place, stepTo) {
  for (const { first, weights } of triangles) {
    let sum = 2 ** (PRECISION - 1);
    let at = start + first * step;
    for (let i = 0; i < weights.length; i++) {
      sum += weights[i] * from[at];
      at += step;
    }
    to[place] = sum >> PRECISION;
    place += stepTo;
  }
}

/** The picture on white, reduced: the first row of each strip, and its RGBA values. */
function* strips(bitmap, reduction) {
  const canvas = new OffscreenCanvas(bitmap.width, STRIP);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  for (let top = 0; top < bitmap.height; top += STRIP) {
    const height = Math.min(STRIP, bitmap.height - top);
    context.fillRect(0, 0, bitmap.width, STRIP);
    context.drawImage(bitmap, 0, -top);
    const { data } = context.getImageData(0, 0, bitmap.width, height);
    yield [top / reduction, reduction > 1 ? reduce(data, bitmap.width, height, reduction) : data];
  }
}

/** The means of squares, about as a JPEG decoder reduces. */
function reduce(data, width, height, reduction) {
  const columns = Math.ceil(width / reduction);
  const rows = Math.ceil(height / reduction);
  const sums = new Uint32Array(rows * columns * 4);
  for (let y = 0, from = 0; y < height; y++) {
    const row = Math.floor(y / reduction) * columns;
    for (let x = 0; x < width; x++, from += 4) {
      const to = 4 * (row + Math.floor(x / reduction));
      for (let channel = 0; channel < 4; channel++) sums[to + channel] += data[from + channel];
    }
  }
  // The last square of a row or column may have fewer pixels; the fourth channel, 255, counts them.
  return sums.map((sum, i) => Math.round(255 * sum / sums[i | 3]));
}


// ------------------------------------------------------------------------------------------------
// Beam search

/** The most probable caption, as decoding.beam_search finds it: a beam that ends leaves the search,
 *  the others continue with one beam less; of equal scores the first counts: the lower beam, then
 *  the lower word. */
async function beamSearch({ ort, model, encoder, decoder }, pixels, beamSize) {
  const { image_size: size, length_penalty: penalty, max_len: maxLength } = model;
  const steps = maxLength + 1;  // so that so many words and <end> fit
  const rank = beam => beam.score / beam.words.length ** penalty;
  const best = beams => beams.reduce((a, b) => rank(b) > rank(a) ? b : a);

  const images = new ort.Tensor("uint8", pixels, [1, size, size, 3]);
  const { h, c, ...features } = await encoder.run({ images });
  let states = [h, c];
  let open = [{ score: 0, words: [], alphas: [] }];
  const ended = [];

  for (let step = 0; step < steps && open.length; step++) {
    const last = open.map(beam => beam.words.at(-1) ?? model.start);
    const words = new ort.Tensor("int32", last, [1, open.length]);
    const next = await decoder.run({ words, h: states[0], c: states[1], ...features });
    const found = mostProbable(open, next.log_probs, model.never, beamSize - ended.length);
    const grown = found.map(({ parent, word, score }) => ({
      parent,
      score,
      words: [...open[parent].words, word],
      alphas: [...open[parent].alphas, row(next.alpha, parent)],
    }));
    const ends = beam => beam.words.at(-1) === model.end;
    ended.push(...grown.filter(ends));
    open = grown.filter(beam => !ends(beam));

    // Sums only fall: at best an open beam keeps its sum, and is so many words long in the end.
    const hope = open.length ? open[0].score / steps ** penalty : -Infinity;
    if (ended.length && hope <= rank(best(ended))) break;
    const parents = open.map(beam => beam.parent);
    states = [next.h_next, next.c_next].map(tensor => gather(ort, tensor, parents));
  }

  const { words, alphas, score } = best(ended.length ? ended : open);
  const length = words.length - (ended.length > 0);  // without <end>
  return {
    words: words.slice(0, length).map(word => model.words[word]),
    small: words.slice(0, length).map(word => model.function_words.includes(word)),
    alphas: alphas.slice(0, length),
    ended: ended.length > 0,
    score,
  };
}

/** The `number` best continuations of the beams, the best first. */
function mostProbable(beams, logProbs, never, number) {
  const found = [];
  beams.forEach((beam, parent) => {
    const ofWords = row(logProbs, parent);
    for (const word of never) ofWords[word] = -Infinity;
    ofWords.forEach((logProb, word) => {
      const score = Math.fround(beam.score + logProb);
      if (score === -Infinity || found.length === number && score <= found.at(-1).score) return;
      const place = found.findIndex(other => score > other.score);
      found.splice(place < 0 ? found.length : place, 0, { parent, word, score });
      found.length = Math.min(found.length, number);
    });
  });
  return found;
}

/** What a tensor (1, K, ...) has of a beam, a copy. */
function row(tensor, beam) {
  const length = tensor.data.length / tensor.dims[1];
  return tensor.data.slice(beam * length, (beam + 1) * length);
}

function gather(ort, tensor, beams) {
  const [, K, ...rest] = tensor.dims;
  const length = tensor.data.length / K;
  const data = new Float32Array(beams.length * length);
  beams.forEach((beam, place) => data.set(row(tensor, beam), place * length));
  return new ort.Tensor("float32", data, [1, beams.length, ...rest]);
}


// ------------------------------------------------------------------------------------------------
// The model

/** What beamSearch needs, loaded: from the server, or what the browser kept of it. */
async function load(onProgress) {
  if (typeof WebAssembly === "undefined" || typeof OffscreenCanvas === "undefined") {
    throw new Failure("browser");
  }
  const answer = await request(`${MODEL}/model.json`, { cache: "no-cache" });
  const model = await answer.json().catch(() => ({}));
  if (model.format_version !== FORMAT_VERSION) throw new Failure("model", `${MODEL}/model.json`);

  const [encoderFile, decoderFile, wasmBinary] = await files([
    `${MODEL}/encoder.onnx`,
    `${MODEL}/decoder.onnx`,
    `${RUNTIME}/ort-wasm-simd-threaded.wasm`,
  ], onProgress);
  const runtime = `${RUNTIME}/ort.wasm.min.mjs`;
  const ort = await import(`./${runtime}`).catch(() => {
    throw new Failure("missing", runtime);
  });
  // Threads would need a server that sends special headers.
  Object.assign(ort.env.wasm, { numThreads: 1, wasmBinary });
  const open = file => ort.InferenceSession.create(file).catch(error => {
    throw new Failure("model", error.message);
  });
  return { ort, model, encoder: await open(encoderFile), decoder: await open(decoderFile) };
}

/** Their bytes. What is kept is taken if the server still has the same. */
async function files(urls, onProgress) {
  // Only pages from https and from this machine may keep files, and not in private windows.
  const cache = await self.caches?.open(CACHE).catch(() => undefined);
  const plans = await Promise.all(urls.map(url => plan(url, cache)));
  const total = plans.reduce((sum, { size }) => sum + size, 0);
  let loaded = 0;
  const onBytes = bytes => onProgress({ loaded: loaded += bytes, total });
  return Promise.all(plans.map(async ({ url, kept, version }) => {
    if (kept) return new Uint8Array(await kept.arrayBuffer());
    const content = await download(url, onBytes);
    const headers = { version };
    await cache?.put(url, new Response(content, { headers })).catch(() => {});  // the disk is full
    return content;
  }));
}

async function plan(url, cache) {
  const kept = await cache?.match(url);
  const answer = await request(url, { method: "HEAD", cache: "no-store" });
  const names = ["etag", "last-modified", "content-length"];
  const version = names.map(name => answer.headers.get(name)).filter(Boolean).join(" ");
  if (kept?.headers.get("version") === version) return { url, kept, size: 0 };
  return { url, version, size: Number(answer.headers.get("content-length")) };
}

async function download(url, onBytes) {
  const answer = await request(url, { cache: "no-store" });
  const parts = [];
  const reader = answer.body.getReader();
  for (;;) {
    const { done, value } = await reader.read().catch(() => {
      throw new Failure("offline", url);
    });
    if (done) break;
    parts.push(value);
    onBytes(value.length);
  }
  return new Uint8Array(await new Blob(parts).arrayBuffer());
}

async function request(url, options) {
  const answer = await fetch(url, options).catch(() => {
    throw new Failure("offline", url);
  });
  if (!answer.ok) throw new Failure("missing", url);
  return answer;
}


// ------------------------------------------------------------------------------------------------
// Messages

const loading = load(postMessage);
loading.then(
  ({ model }) => postMessage({ model }),
  error => postMessage({ failure: told(error) }));
let last = loading.catch(() => {});  // pictures are captioned one after the other

self.addEventListener("message", ({ data: { picture, beamSize, number } }) => {
  last = last.then(async () => {
    try {
      const captioner = await loading;
      const begin = performance.now();
      const pixels = await readImage(picture, captioner.model.image_size);
      const caption = await beamSearch(captioner, pixels, beamSize);
      caption.seconds = (performance.now() - begin) / 1000;
      postMessage({ number, caption });
    } catch (error) {
      postMessage({ number, failure: told(error) });
    }
  });
});

function told(error) {
  return error.told ?? { reason: "error", what: `${error}` };
}
