// The page: takes pictures, has captioner.js caption them, shows what it found.
import { card, element } from "./attention.js";

const FAILURES = {  // what captioner.js and this page report, in both languages
  picture: what => [
    `读不了“${what}”：不是这个浏览器能打开的图片。`,
    `Cannot read “${what}”: not a picture that this browser can open.`],
  missing: what => [
    `这个网站缺少 ${what}：重新运行 make site，把 site 文件夹完整放上服务器。`,
    `This site lacks ${what}: run make site, and put all of the folder site on the server.`],
  offline: what => [
    `${what} 没有取到：连不上服务器。联网后重新载入本页。`,
    `${what} did not arrive: the server cannot be reached. Reload this page when it can.`],
  model: what => [
    `模型打不开（${what}）：删除 site 文件夹，重新运行 make site。`,
    `The model cannot be opened (${what}): remove the folder site and run make site again.`],
  browser: () => [
    "这个浏览器太旧：需要 WebAssembly、模块 worker 和 OffscreenCanvas。",
    "This browser is too old: it needs WebAssembly, module workers and OffscreenCanvas."],
  error: what => [
    `没有成功：${what}`,
    `That did not work: ${what}`],
};
const LOOKING = "正在看 Looking…";
const MIB = 2 ** 20;

const page = Object.fromEntries(
  [...document.querySelectorAll("[id]")].map(found => [found.id, found]));
const choose = document.querySelector(".choose");
const main = document.querySelector("main");
const waiting = new Map();  // number of a picture -> what shows that it is being captioned
let model;

page.unstarted.remove();
const captioner = startCaptioner();


// ------------------------------------------------------------------------------------------------
// The model

function startCaptioner() {
  try {
    const worker = new Worker("captioner.js", { type: "module" });
    worker.addEventListener("message", ({ data }) => receive(data));
    worker.addEventListener("error", () => fail("browser"));
    return worker;
  } catch {
    fail("browser");
  }
}

function receive({ loaded, total, model: ready, number, caption, failure }) {
  if (total) showProgress(loaded, total);
  if (ready) {
    model = ready;
    page.loading.hidden = true;
    for (const { figure } of waiting.values()) figure.querySelector("p").textContent = LOOKING;
    page.model.textContent = [`${model.encoder} · epoch ${model.epoch}`, model.note]
      .filter(Boolean).join(" · ");
  }
  if (caption) showCaption(waiting.get(number), caption);
  if (failure) {
    const picture = waiting.get(number);
    picture?.figure.remove();
    if (!number) page.loading.hidden = true;
    fail(failure.reason, picture && failure.reason === "picture" ? picture.name : failure.what);
  }
  waiting.delete(number);
}

function showProgress(loaded, total) {
  const size = bytes => (bytes / MIB).toFixed(1);
  page.loading.hidden = false;
  page.loading.querySelector("p").textContent = loaded < total
    ? `载入模型 Loading the model ${size(loaded)} / ${size(total)} MB`
    : "准备模型 Preparing the model…";
  page.loading.querySelector("progress").value = loaded / total;
}

function fail(reason, what = "") {
  const sentences = FAILURES[reason](what);
  page.failure.hidden = false;
  [...page.failure.children].forEach((line, i) => line.textContent = sentences[i]);
}


// ------------------------------------------------------------------------------------------------
// Pictures

let count = 0;

async function take(files) {
  page.failure.hidden = true;
  for (const file of files) {
    const name = file.name || "图片 picture";
    const image = element("img", { alt: name });
    image.src = URL.createObjectURL(file);
    try {
      await image.decode();
    } catch {
      fail("picture", name);
      continue;
    }
    image.width = image.naturalWidth;
    image.height = image.naturalHeight;
    const figure = waitingFigure(image);
    main.prepend(figure);
    choose.classList.add("small");
    count += 1;
    waiting.set(count, { name, image, figure });
    captioner?.postMessage({ picture: file, beamSize: Number(page.beam.value), number: count });
  }
}

function waitingFigure(image) {
  const picture = element("div", { class: "picture" }, image);
  picture.style.maxWidth = `calc(75vh * ${image.width / image.height})`;
  const text = element("p", {}, model ? LOOKING : "等模型载入 Waiting for the model…");
  return element("figure", { class: "waiting" }, picture, element("figcaption", {}, text));
}

function showCaption({ name, image, figure }, { words, small, alphas, score, ended, seconds }) {
  image.alt = words.join("");
  const about = [element("bdi", {}, name), element("br"),
                 `对数概率 log p ${score.toFixed(3)} · ${seconds.toFixed(1)} s`,
                 ended ? "" : " · 未写完 unfinished"];
  const geometry = { positions: model.positions, weights: model.heat_weights };
  const grids = alphas.map(alpha => Array.from(alpha));
  const made = card({ image, words, small, grids, about }, geometry);
  figure.replaceWith(made.figure);
  made.tell();
}

for (const input of [page.file, page.camera]) {
  input.addEventListener("change", async () => {
    await take([...input.files]);
    input.value = "";  // so that the same picture may be chosen again
  });
}
addEventListener("paste", event => take([...event.clipboardData.files]));
addEventListener("dragover", event => {
  event.preventDefault();
  choose.classList.add("over");
});
addEventListener("dragleave", event => event.relatedTarget || choose.classList.remove("over"));
addEventListener("drop", event => {
  event.preventDefault();
  choose.classList.remove("over");
  take([...event.dataTransfer.files]);
});
