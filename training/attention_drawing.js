"use strict";
// Tokens are counted as the model counts them: a CLS token first, then the squares row by row. ALL is the mean of all.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const side = data.edges.length - 1, cls = data.cls ? 1 : 0, tokens = side * side + cls, ALL = -1;
const special = cls ? 0 : ALL;  // what the classifier reads
const colors = data.colors.map(hex => "#" + hex);
const views = [...Array(data.blocks).keys(), "rollout", "relevance"];
const shown = {image: 0, view: data.blocks - 1, head: "mean", opacity: data.opacity, fit: false};
let chosen, pointed = null, lastCell = 0;  // tokens; `pointed` is under the mouse and not chosen; a cell's number
const pictures = data.images.map(() => ({}));  // once needed: the stored bytes, and the picture in colour and in grey

// ------------------------------------------------------------------------------------------------------------ numbers

function addMap(sum, place, share) {
  const image = data.images[shown.image], picture = pictures[shown.image];
  picture.bytes ??= Uint8Array.from(atob(image.maps), letter => letter.charCodeAt(0));
  const largest = image.largest[place], start = place * tokens * tokens;
  for (let i = 0; i < sum.length; i++) sum[i] += share * largest * (picture.bytes[start + i] / 255) ** 2;
}

const topOf = (...lists) => Math.max(2, ...lists.map(list => list.reduce((a, b) => Math.max(a, b))));

// The map that is shown, tokens x tokens, in multiples of uniform; rows are the tokens that look.
let map, scaleTop;
function readMap() {
  map = new Float64Array(tokens * tokens);
  const {view, head} = shown, {blocks, heads} = data;
  if (view === "rollout" || view === "relevance") addMap(map, blocks * heads + (view === "relevance"), 1);
  else if (head === "mean") for (let h = 0; h < heads; h++) addMap(map, view * heads + h, 1 / heads);
  else addMap(map, view * heads + head, 1);
  scaleTop = topOf(map);
}

const widths = data.edges.slice(1).map((edge, i) => edge - data.edges[i]);
const area = cell => widths[Math.floor(cell / side)] * widths[cell % side];
const total = Array.from({length: side * side}, (_, cell) => area(cell)).reduce((a, b) => a + b);

// One number for each token: what it gets from `token` ("looks"), or what it gives to it ("looked").
function heat(token, direction) {
  const at = (from, to) => map[from * tokens + to];
  return Float64Array.from({length: tokens}, (_, other) => {
    const one = t => direction === "looks" ? at(t, other) : at(other, t);
    if (token !== ALL) return one(token);
    let sum = 0;
    for (let cell = 0; cell < side * side; cell++) sum += area(cell) * one(cell + cls);
    return sum / total;
  });
}

const format = value => (value >= 9.95 ? value.toFixed(0) : value.toFixed(1)) + "×";
const nameOf = token => token === ALL ? "All patches" : token < cls ? "CLS token"
  : `row ${Math.floor((token - cls) / side) + 1}, column ${(token - cls) % side + 1}`;
const highest = values => [...values.keys()].sort((a, b) => values[b] - values[a] || a - b).slice(0, 3);
const colorOf = value => colors[Math.round(255 * Math.sqrt(Math.min(1, value / scaleTop)))];

// ------------------------------------------------------------------------------------------------------------ drawing

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

function loadPicture(number) {
  const picture = pictures[number];
  if (picture.loading) return;
  picture.loading = true;
  const image = new Image();
  image.onload = () => {
    picture.grey = element("canvas", {width: data.size, height: data.size});
    const context = picture.grey.getContext("2d");
    context.drawImage(image, 0, 0);
    const pixels = context.getImageData(0, 0, data.size, data.size);
    for (let i = 0; i < pixels.data.length; i += 4) {  // with little contrast
      const mean = (pixels.data[i] + pixels.data[i + 1] + pixels.data[i + 2]) / 3;
      pixels.data.fill((mean + 0.3 * 255) / 1.9, i, i + 3);
    }
    context.putImageData(pixels, 0, 0);
    picture.color = image;
    if (number === shown.image) draw();
  };
  image.src = data.images[number].picture;
}

function drawSquare(id, values, token) {
  const canvas = byId(id), scale = devicePixelRatio || 1, width = Math.round(canvas.clientWidth * scale);
  const picture = pictures[shown.image], context = canvas.getContext("2d");
  if (!width) return;
  canvas.width = canvas.height = width;
  const unit = width / data.size, lines = data.edges.map(edge => Math.round(edge * unit));
  context.imageSmoothingEnabled = unit < 1;
  if (picture.color) context.drawImage(values ? picture.grey : picture.color, 0, 0, width, width);
  const box = cell => {
    const row = Math.floor(cell / side), column = cell % side;
    return [lines[column], lines[row], lines[column + 1] - lines[column], lines[row + 1] - lines[row]];
  };
  if (values) {
    context.globalAlpha = shown.opacity;
    for (let cell = 0; cell < side * side; cell++) {
      context.fillStyle = colorOf(values[cell + cls]);
      context.fillRect(...box(cell));
    }
    context.globalAlpha = 1;
  }
  if (token >= cls) {
    const [x, y, w, h] = box(token - cls), line = Math.max(1, Math.round(2 * scale));
    for (const [inset, color] of [[0.5, "#000"], [1.5, "#fff"], [2.5, "#000"]]) {
      const inside = (inset - 1) * line;
      context.strokeStyle = color;
      context.lineWidth = line;
      context.strokeRect(x + inside, y + inside, w - 2 * inside, h - 2 * inside);
    }
  }
  if (values && !(token === ALL && isFlat(values))) highest(values).forEach((other, rank) => {
    const [x, y, w, h] = other < cls ? [0, 0, 0, 0] : box(other - cls);
    if (w < 16 * scale) return;
    context.font = `bold ${Math.min(0.45 * w, 17 * scale)}px system-ui, sans-serif`;
    context.textAlign = "center";
    context.textBaseline = "middle";
    context.lineJoin = "round";
    context.lineWidth = 3.5 * scale;
    context.strokeStyle = "#000";
    context.fillStyle = "#fff";
    context.strokeText(rank + 1, x + w / 2, y + h / 2);
    context.fillText(rank + 1, x + w / 2, y + h / 2);
  });
}

const isFlat = values => Math.max(...values) - Math.min(...values) < 0.1;

function titles(token) {
  if (token === ALL) return ["Where all patches look, on average", "Who looks at all patches, on average"];
  const name = token < cls ? "the CLS token" : "this patch";
  return [`Where ${name} looks`, `Who looks at ${name}`];
}

const nameSeenFrom = (other, token) => nameOf(other) + (other === token ? " (itself)" : "");
const describe = (values, token) =>
  highest(values).map(other => `${nameSeenFrom(other, token)}, ${format(values[other])}`).join("; ");

function draw() {
  const token = pointed ?? chosen;
  const maps = {looks: heat(token, "looks"), looked: heat(token, "looked")};
  if (shown.fit) {
    scaleTop = topOf(maps.looks, maps.looked);
    drawScale();
  }
  drawSquare("picture", null, token);
  const headings = titles(token);
  ["looks", "looked"].forEach((id, i) => {
    const values = maps[id];
    drawSquare(id, values, token);
    byId(`${id}-title`).textContent = headings[i];
    byId(id).setAttribute("aria-label", `${headings[i]}: ${describe(values, token)}`);
    const under = byId(`${id}-special`), list = byId(`${id}-list`);
    under.replaceChildren();
    if (cls) {
      const swatch = element("i");
      swatch.style.background = colorOf(values[0]);
      under.append(swatch, `CLS token ${format(values[0])}`);
    }
    byId(`${id}-list-title`).textContent = i === 0 ? "Looks most at" : "Looked at most by";
    list.replaceChildren(...highest(values).map((other, rank) => element("li", {},
      element("b", {"aria-hidden": true}, `${rank + 1}`),
      element("span", {}, nameSeenFrom(other, token)),
      element("span", {class: "times"}, format(values[other])))));
    if (token === ALL && i === 1 && isFlat(values))
      list.replaceChildren(element("li", {}, "Every patch gives away the same in all, so that each has 1.0×."));
  });
  byId("special").setAttribute("aria-pressed", token === special);
  document.querySelectorAll("[role=gridcell]").forEach((cell, number) => {
    cell.setAttribute("aria-selected", number + cls === chosen);
    cell.tabIndex = number === lastCell ? 0 : -1;
  });
  if (byId("numbers").open) drawTables(maps, headings);
}

function drawTables(maps, headings) {
  byId("tables").replaceChildren(...["looks", "looked"].map((id, i) => {
    const heads = widths.map((_, column) => element("th", {scope: "col"}, `${column + 1}`));
    const rows = widths.map((_, row) => element("tr", {}, element("th", {scope: "row"}, `${row + 1}`),
      ...widths.map((_, column) => element("td", {}, maps[id][row * side + column + cls].toFixed(2)))));
    const name = headings[i] + (cls ? ` (CLS token: ${maps[id][0].toFixed(2)})` : "");
    const table = element("table", {}, element("caption", {}, name),
      element("thead", {}, element("tr", {}, element("td"), ...heads)), element("tbody", {}, ...rows));
    return element("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": name}, table);
  }));
}

function drawScale() {
  const stops = Array.from({length: 33}, (_, i) => colors[Math.round(255 * i / 32)]);
  byId("gradient").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  byId("gradient").style.opacity = shown.opacity;
  const steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], ticks = [0];
  const place = value => Math.sqrt(value / scaleTop);
  for (const step of steps)
    if (place(step) - place(ticks.at(-1)) > 0.1 && place(step) < 0.9) ticks.push(step);
  byId("ticks").replaceChildren(...[...ticks, scaleTop].map(value => {
    const tick = element("span", {}, value === scaleTop ? format(value) : `${value}×`);
    tick.style.left = `${100 * place(value)}%`;
    return tick;
  }));
  const what = shown.view === "relevance" ? "relevance" : "attention";
  byId("unit").textContent = `1× is what a patch would get if all got the same ${what}. Colours go with the square `
    + `root; the scale is ${shown.fit ? "that of this patch" : "the same for every patch of this map"}.`;
}

function drawImageTexts() {
  const image = data.images[shown.image], order = [...data.classes.keys()];
  order.sort((a, b) => image.probabilities[b] - image.probabilities[a]);
  const percent = p => `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)} %`;
  const said = data.classes[order[0]], known = image.label >= 0, right = order[0] === image.label;
  const verdict = byId("verdict");
  verdict.replaceChildren(`${said}, ${percent(image.probabilities[order[0]])}`);
  if (known) verdict.append(" – ", element("span", {class: right ? "right" : "wrong"},
    right ? "right" : `wrong, it is: ${data.classes[image.label]}`));
  const row = (kind, name, middle, p) => element("li", {class: kind},
    element("span", {class: "name"}, name), middle, element("span", {class: "percent"}, percent(p)));
  byId("bars").replaceChildren(...order.slice(0, 10).map((index, rank) => {
    const p = image.probabilities[index], bar = element("div"), isRight = index === image.label;
    bar.style.width = `${100 * p}%`;
    const track = element("span", {class: "track", "aria-hidden": true}, bar);
    const kind = isRight ? "right" : rank === 0 && known ? "wrong" : "";
    return row(kind, data.classes[index] + (isRight ? " ✓" : ""), track, p);
  }));
  const rest = order.slice(10).reduce((sum, index) => sum + image.probabilities[index], 0);
  if (order.length > 10) byId("bars").append(row("", `${order.length - 10} others`, element("span"), rest));
  byId("picture-title").textContent = image.name || `Image ${titleOf(image, shown.image)}`;
  byId("picture").setAttribute("aria-label", `The picture ${titleOf(image, shown.image)}`);
}

const titleOf = (image, number) => image.name || `${number + 1}: ${data.classes[image.label]}`;

function drawCaption() {
  const {view, head} = shown, said = data.classes[predicted(data.images[shown.image])];
  const whose = data.model_heads === 1 ? "its only head"
    : head === "mean" ? `the mean of its ${data.model_heads} heads` : `head ${head + 1}`;
  byId("caption").textContent = view === "rollout"
    ? "Rollout: the attention of all blocks, multiplied; half of each token goes straight on (Abnar & Zuidema 2020)."
    : view === "relevance"
    ? `Relevance for “${said}”, the class it says: the attention of all blocks, weighted by its gradient `
      + "(Chefer et al. 2021)."
    : `Attention in block ${view + 1} of ${data.blocks}, ${whose}. Point at a patch to see where it looks, and who `
      + "looks at it.";
  byId("heads").disabled = data.heads === 1 || typeof view !== "number";
}

const predicted = image => image.probabilities.indexOf(Math.max(...image.probabilities));

function showMap() {
  readMap();
  drawCaption();
  drawScale();
  draw();
}
