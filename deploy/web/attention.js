// Pictures with their captions: a word that is pointed at shows where the model looked as it wrote
// it. index.html and images/template.html share it.

const WORD_MS = 1000;  // how long a word is shown by ▶
const TELL_MS = 400;  // and when a caption is told for the first time
const MORPH_MS = 250;  // from a word's attention to the next one's
const PLACES = [
  "左上 top left", "上方 top", "右上 top right",
  "左边 left", "中间 centre", "右边 right",
  "左下 bottom left", "下方 bottom", "右下 bottom right",
];
const still = matchMedia("(prefers-reduced-motion: reduce)");

// From transparent, where attention is 0, to yellow, where it is strongest. 256 colours of 4 bytes.
const colours = (() => {
  const context = element("canvas", { width: 256, height: 1 }).getContext("2d");
  const ramp = context.createLinearGradient(0, 0, 256, 0);
  const stops = ["#4000a000", "#8f1a9c59", "#e0304f8c", "#ff8a1f99", "#ffe95aa6"];
  stops.forEach((colour, i) => ramp.addColorStop(i / 4, colour));
  context.fillStyle = ramp;
  context.fillRect(0, 0, 256, 1);
  return context.getImageData(0, 0, 256, 1).data;
})();

/** An element. Text goes in as text, never as HTML: words and file names are not to be trusted. */
export function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

/** Draw a grid of attention (s * s numbers, row by row), the strongest place as hot as can be.
 *  `weights` say how much of each of its rows (or columns, they are alike) a row of the heat map
 *  takes; CSS stretches the map over the picture. */
function paint(canvas, grid, weights) {
  const side = weights.length;
  const s = weights[0].length;
  const wide = [];  // (s, side): stretched across
  for (let y = 0; y < s; y++) {
    wide.push(weights.map(near =>
      near.reduce((sum, weight, x) => sum + weight * grid[y * s + x], 0)));
  }
  const heat = [];
  for (const near of weights) {
    for (let x = 0; x < side; x++) {
      heat.push(near.reduce((sum, weight, y) => sum + weight * wide[y][x], 0));
    }
  }
  const most = heat.reduce((a, b) => Math.max(a, b), 1e-9);
  const image = new ImageData(side, side);
  heat.forEach((value, i) => {
    const colour = 4 * Math.round(255 * value / most);
    image.data.set(colours.subarray(colour, colour + 4), 4 * i);
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
}

/** Where in the picture a grid is strongest, in words, for those who cannot see it. */
function whereabouts(grid, positions) {
  const peak = grid.indexOf(Math.max(...grid));
  const s = positions.length;
  const third = i => Math.min(Math.floor(3 * positions[i]), 2);
  return PLACES[3 * third(Math.floor(peak / s)) + third(peak % s)];
}

let rest = () => {};  // puts the picture that is lit, one at a time, back to rest
addEventListener("keydown", event => event.key === "Escape" && rest());

/** A figure of a picture with its caption, which `tell` tells word by word.
 *
 *  image: an <img> with its width and height.
 *  words, small: whether each says nothing by itself; grids: its attention, s * s numbers.
 *  about: elements of the line below.
 *  positions, weights: of the attention's rows, see visualize.py. */
export function card({ image, words, small, grids, about }, { positions, weights }) {
  const side = weights.length;
  const canvas = element("canvas", { width: side, height: side, "aria-hidden": true });
  const buttons = words.map((word, i) => element("button", {
    type: "button",
    class: small[i] ? "small" : "",
    "aria-pressed": false,
    "aria-label": `${word}：${whereabouts(grids[i], positions)}`,
  }, word));
  const play = element("button", { type: "button", class: "play" });
  const picture = element("div", { class: "picture" }, image, canvas);
  picture.style.maxWidth = `calc(75vh * ${image.width / image.height})`;
  const all = words.map((_, i) => i);
  const telling = all.filter(i => !small[i]);  // what ▶ shows

  let shown = -1;
  let pinned = -1;
  let timer = 0;
  let frame = 0;
  let grid = [];

  function show(index) {  // a word's attention, or none with -1
    buttons.forEach((button, i) => button.setAttribute("aria-pressed", i === index));
    picture.classList.toggle("lit", index >= 0);
    cancelAnimationFrame(frame);
    if (index >= 0) glide(grids[index]);
    shown = index;
  }

  function glide(to) {  // from the word before it; from nothing it fades in, by CSS
    const from = grid;
    const begin = performance.now();
    const length = shown >= 0 && !still.matches ? MORPH_MS : 0;
    const step = now => {
      const part = length ? Math.min(Math.max((now - begin) / length, 0), 1) : 1;
      const mixed = (value, i) => part < 1 ? from[i] + part * (value - from[i]) : value;
      grid = Array.from(to, mixed);
      paint(canvas, grid, weights);
      if (part < 1) frame = requestAnimationFrame(step);
    };
    step(begin);
  }

  function stop() {
    clearInterval(timer);
    timer = 0;
    buttons.forEach(button => button.classList.remove("unsaid"));
    play.textContent = "▶\ufe0e";  // as text, not as a coloured picture
    play.setAttribute("aria-label", "播放 play");
  }

  function clear() {
    stop();
    show(pinned = -1);
  }

  function light(index) {
    if (rest !== clear) rest();
    rest = clear;
    stop();
    show(index);
  }

  function run(indices, ms, onWord = () => {}) {
    let next = 1;
    light(indices[0]);
    onWord(indices[0]);
    timer = setInterval(() => {
      if (next === indices.length) return clear();
      show(indices[next]);
      onWord(indices[next]);
      next += 1;
    }, ms);
    play.textContent = "■";
    play.setAttribute("aria-label", "停止 stop");
  }

  function tell() {
    if (still.matches || !words.length) return;
    run(all, TELL_MS, index =>
      buttons.forEach((button, i) => button.classList.toggle("unsaid", i > index)));
  }

  buttons.forEach((button, i) => {
    button.addEventListener("pointerenter", event => event.pointerType === "mouse" && light(i));
    button.addEventListener("focus", () => button.matches(":focus-visible") && light(pinned = i));
    button.addEventListener("click", () => light(pinned = pinned === i ? -1 : i));
    button.addEventListener("keydown", event => {
      const to = buttons[i + { ArrowLeft: -1, ArrowRight: 1 }[event.key]];
      if (to) to.focus();
    });
  });
  play.addEventListener("click", () => timer ? clear() : run(telling, WORD_MS));
  const caption = element("div", { class: "words", role: "group", "aria-label": "描述 caption" },
                          ...buttons);
  caption.addEventListener("pointerleave", event =>
    event.pointerType === "mouse" && !timer && show(pinned));
  if (!words.length) caption.append("（空）");
  stop();

  const line = element("div", { class: "about" }, element("small", {}, ...about));
  if (telling.length) line.append(play);
  const figure = element("figure", {}, picture, element("figcaption", {}, caption, line));
  return { figure, tell };
}
