"use strict";
// Tokens are counted as the model counts them: a CLS token first, then the squares row by row. ALL is the mean of all.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const side = data.edges.length - 1, cls = data.cls ? 1 : 0, tokens = side * side + cls, ALL = -1;
const special = cls ? 0 : ALL;  // what the classifier reads
const colors = data.colors.map(hex => "#" + hex);
const views = [...Array(data.blocks).keys(), "rollout", "relevance"];
const shown = {image: 0, view: data.blocks - 1, head: "mean", opacity: data.opacity};
let chosen, pointed = null, lastCell = 0;  // tokens; `pointed` is under the mouse and not chosen; a cell's number
const pictures = data.images.map(() => ({}));  // once needed: the stored bytes, and the picture in colour and in grey

// ------------------------------------------------------------------------------------------------------------ numbers

function addMap(sum, place, share) {
  const image = data.images[shown.image], picture = pictures[shown.image];
  picture.bytes ??= Uint8Array.from(atob(image.maps), letter => letter.charCodeAt(0));
  const largest = image.largest[place], start = place * tokens * tokens;
  for (let i = 0; i < sum.length; i++) sum[i] += share * largest * (picture.bytes[start + i] / 255) ** 2;
}

// The map that is shown, tokens x tokens, in multiples of uniform; rows are the tokens that look.
let map, top2;
function readMap() {
  map = new Float64Array(tokens * tokens);
  const {view, head} = shown, {blocks, heads} = data;
  if (view === "rollout" || view === "relevance") addMap(map, blocks * heads + (view === "relevance"), 1);
  else if (head === "mean") for (let h = 0; h < heads; h++) addMap(map, view * heads + h, 1 / heads);
  else addMap(map, view * heads + head, 1);
  top2 = Math.max(2, map.reduce((a, b) => Math.max(a, b)));
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
const colorOf = value => colors[Math.round(255 * Math.sqrt(Math.min(1, value / top2)))];

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
      context.strokeStyle = color;
      context.lineWidth = line;
      context.strokeRect(x + (inset - 1) * line, y + (inset - 1) * line, w - 2 * (inset - 1) * line, h - 2 * (inset - 1) * line);
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

function describe(values, token) {
  return highest(values).map(other => `${nameOf(other)}${other === token ? " (itself)" : ""}, ${format(values[other])}`);
}

function draw() {
  const token = pointed ?? chosen;
  const maps = {looks: heat(token, "looks"), looked: heat(token, "looked")};
  drawSquare("picture", null, token);
  const headings = titles(token);
  ["looks", "looked"].forEach((id, i) => {
    const values = maps[id];
    drawSquare(id, values, token);
    byId(`${id}-title`).textContent = headings[i];
    byId(id).setAttribute("aria-label", `${headings[i]}: ${describe(values, token).join("; ")}`);
    const under = byId(`${id}-special`), list = byId(`${id}-list`);
    under.replaceChildren();
    if (cls) {
      const swatch = element("i");
      swatch.style.background = colorOf(values[0]);
      under.append(swatch, `CLS token ${format(values[0])}`);
    }
    byId(`${id}-list-title`).textContent = i === 0 ? "Looks most at" : "Looked at most by";
    list.replaceChildren(...highest(values).map((other, rank) => element("li", {}, element("b", {"aria-hidden": true}, `${rank + 1}`),
      element("span", {}, nameOf(other) + (other === token ? " (itself)" : "")), element("span", {class: "times"}, format(values[other])))));
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
    const head = element("tr", {}, element("td"), ...widths.map((_, column) => element("th", {scope: "col"}, `${column + 1}`)));
    const rows = widths.map((_, row) => element("tr", {}, element("th", {scope: "row"}, `${row + 1}`),
      ...widths.map((_, column) => element("td", {}, maps[id][row * side + column + cls].toFixed(2)))));
    const name = headings[i] + (cls ? ` (CLS token: ${maps[id][0].toFixed(2)})` : "");
    const table = element("table", {}, element("caption", {}, name), element("thead", {}, head), element("tbody", {}, ...rows));
    return element("div", {class: "scroll", tabindex: 0, role: "region", "aria-label": name}, table);
  }));
}

function drawScale() {
  const stops = Array.from({length: 33}, (_, i) => colors[Math.round(255 * i / 32)]);
  byId("gradient").style.background = `linear-gradient(to right, ${stops.join(", ")})`;
  byId("gradient").style.opacity = shown.opacity;
  const steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000], ticks = [0];
  const place = value => Math.sqrt(value / top2);
  for (const step of steps)
    if (place(step) - place(ticks.at(-1)) > 0.1 && place(step) < 0.9) ticks.push(step);
  byId("ticks").replaceChildren(...[...ticks, top2].map(value => {
    const tick = element("span", {}, value === top2 ? format(value) : `${value}×`);
    tick.style.left = `${100 * place(value)}%`;
    return tick;
  }));
  const what = shown.view === "relevance" ? "relevance" : "attention";
  byId("unit").textContent = `1× is what a patch would get if all got the same ${what}. Colours go with the square root; the `
    + "scale is the same for every patch of this map.";
}

function drawImageTexts() {
  const image = data.images[shown.image], order = [...data.classes.keys()];
  order.sort((a, b) => image.probabilities[b] - image.probabilities[a]);
  const percent = p => p > 0.9995 ? "100 %" : p < 0.0995 ? `${(100 * p).toFixed(1)} %` : `${(100 * p).toFixed(0)} %`;
  const said = data.classes[order[0]], known = image.label >= 0, right = order[0] === image.label;
  const verdict = byId("verdict");
  verdict.replaceChildren(`${said}, ${percent(image.probabilities[order[0]])}`);
  if (known) verdict.append(" – ", element("span", {class: right ? "right" : "wrong"}, right ? "right" : `wrong, it is: ${data.classes[image.label]}`));
  byId("bars").replaceChildren(...order.slice(0, 10).map((index, rank) => {
    const bar = element("div"), kind = index === image.label ? "right" : rank === 0 && known ? "wrong" : "";
    bar.style.width = `${100 * image.probabilities[index]}%`;
    return element("li", {class: kind}, element("span", {class: "name"}, data.classes[index] + (index === image.label ? " ✓" : "")),
      element("span", {class: "track", "aria-hidden": true}, bar), element("span", {class: "percent"}, percent(image.probabilities[index])));
  }));
  if (order.length > 10) byId("bars").append(element("li", {}, element("span", {class: "name"}, `${order.length - 10} others`),
    element("span"), element("span", {class: "percent"}, percent(order.slice(10).reduce((sum, i) => sum + image.probabilities[i], 0)))));
  byId("picture-title").textContent = image.name || `Image ${titleOf(image, shown.image)}`;
  byId("picture").setAttribute("aria-label", `The picture ${titleOf(image, shown.image)}`);
}

const titleOf = (image, number) => image.name || `${number + 1}: ${data.classes[image.label]}`;

function drawCaption() {
  const {view, head} = shown, said = data.classes[predicted(data.images[shown.image])];
  const whose = data.model_heads === 1 ? "its only head" : head === "mean" ? `the mean of its ${data.model_heads} heads` : `head ${head + 1}`;
  byId("caption").textContent = view === "rollout"
    ? "Rollout: the attention of all blocks, multiplied; half of each token goes straight on (Abnar & Zuidema 2020)."
    : view === "relevance"
    ? `Relevance for “${said}”, the class it says: the attention of all blocks, weighted by its gradient (Chefer et al. 2021).`
    : `Attention in block ${view + 1} of ${data.blocks}, ${whose}.`;
  byId("heads").disabled = data.heads === 1 || typeof view !== "number";
}

const predicted = image => image.probabilities.indexOf(Math.max(...image.probabilities));

function showMap() {
  readMap();
  drawCaption();
  drawScale();
  draw();
}

// ------------------------------------------------------------------------------------------------------------ choosing

let waiting;
function choose(token) {
  chosen = token;
  pointed = null;
  if (token >= cls) lastCell = token - cls;
  draw();
  clearTimeout(waiting);  // who holds an arrow key down hears where it ends
  waiting = setTimeout(announce, 250);
}

function announce() {
  const name = nameOf(chosen), upper = name[0].toUpperCase() + name.slice(1);
  const [to, from] = ["looks", "looked"].map(direction => describe(heat(chosen, direction), chosen).join("; "));
  byId("announcement").textContent = `${upper}. Looks most at ${to}. Looked at most by ${from}.`;
}

function addRadio(group, name, value, text, label, checked, onChange) {
  const input = element("input", {type: "radio", name, value, "aria-label": label});
  input.checked = checked;
  input.addEventListener("change", onChange);
  const made = element("label", {}, input, text);
  byId(group).append(made);
  return made;
}

data.images.forEach((image, number) => {
  const best = predicted(image), wrong = image.label >= 0 && best !== image.label, name = titleOf(image, number);
  const label = name + (wrong ? `, wrong: ${data.classes[best]}` : "");
  const picture = element("img", {src: image.picture, alt: "", width: 44, height: 44});
  const made = addRadio("images", "image", number, picture, label, number === 0, () => {
    shown.image = number;
    loadPicture(number);
    drawImageTexts();
    showMap();
  });
  made.title = label;
  made.classList.toggle("wrong", wrong);
});
views.forEach(view => {
  const block = typeof view === "number", text = block ? `${view + 1}` : view;
  addRadio("views", "view", view, element("span", {}, text), block ? `block ${text}` : `all blocks: ${view}`, view === shown.view, () => {
    shown.view = view;
    showMap();
  });
});
["mean", ...Array(data.heads).keys()].forEach(head => {
  const text = head === "mean" ? "mean" : `${head + 1}`;
  addRadio("heads", "head", head, element("span", {}, text), head === "mean" ? "mean of all heads" : `head ${text}`, head === "mean", () => {
    shown.head = head;
    showMap();
  });
});
byId("opacity").value = 100 * shown.opacity;
byId("opacity").addEventListener("input", event => {
  shown.opacity = event.target.value / 100;
  drawScale();
  draw();
});
byId("themes").addEventListener("change", event => { document.documentElement.dataset.theme = event.target.value; });
byId("numbers").addEventListener("toggle", draw);
byId("special").textContent = cls ? "CLS token" : "All patches, averaged";
byId("special").addEventListener("click", () => choose(special));

// The squares as a grid: for the keyboard and for screen readers.
const places = data.edges.map(edge => 100 * edge / data.size);
for (let row = 0; row < side; row++) {
  const line = element("div", {role: "row"});
  for (let column = 0; column < side; column++) {
    const cell = element("div", {role: "gridcell", "aria-label": `row ${row + 1}, column ${column + 1}`, tabindex: -1});
    Object.assign(cell.style, {left: `${places[column]}%`, top: `${places[row]}%`,
      width: `${places[column + 1] - places[column]}%`, height: `${places[row + 1] - places[row]}%`});
    cell.addEventListener("click", () => choose(row * side + column + cls));
    line.append(cell);
  }
  byId("cells").append(line);
}
byId("cells").addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const row = Math.floor(lastCell / side), column = lastCell % side, last = side - 1;
  const moves = {ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
    Home: [row, 0], End: [row, last], PageUp: [0, column], PageDown: [last, column], Enter: [row, column], " ": [row, column]};
  const to = moves[event.key]?.map(place => Math.max(0, Math.min(last, place)));
  if (!to) return;
  event.preventDefault();
  choose(to[0] * side + to[1] + cls);
  document.querySelectorAll("[role=gridcell]")[lastCell].focus();
});

// A mouse shows what it points at, and chooses with a click; so does a tap.
function tokenAt(event, square) {
  const box = square.getBoundingClientRect();
  const find = place => data.edges.findIndex((edge, i) => i < side && edge <= place && place < data.edges[i + 1]);
  const row = find((event.clientY - box.top) / box.height * data.size), column = find((event.clientX - box.left) / box.width * data.size);
  return row < 0 || column < 0 ? null : row * side + column + cls;
}
document.querySelectorAll(".square").forEach(square => {
  square.addEventListener("pointermove", event => {
    const token = tokenAt(event, square);
    if (event.pointerType === "touch") {
      if (token !== null && token !== chosen) choose(token);
    } else if (token !== pointed) {
      pointed = token;
      draw();
    }
  });
  square.addEventListener("pointerleave", event => {
    if (event.pointerType === "touch") return;
    pointed = null;
    draw();
  });
  square.addEventListener("click", event => {
    const token = tokenAt(event, square);
    if (token !== null && !event.target.matches("[role=gridcell]")) choose(token);
  });
});

// ------------------------------------------------------------------------------------------------------------ the start

byId("model").textContent += ` · ${data.blocks} ${data.blocks === 1 ? "block" : "blocks"} of ${data.model_heads} `
  + `${data.model_heads === 1 ? "head" : "heads"} · ${data.grid}×${data.grid} patches of ${data.patch}×${data.patch} pixels · `
  + (cls ? "with a CLS token, which the classifier reads" : "no CLS token: the classifier reads the mean of all patches");
const covered = data.edges.at(-1);
const explanations = [
  "Attention is a table: for each token (a patch, or the CLS token) how much it takes from each other one, in each block and head. "
    + "The middle picture is the row of the patch that is chosen, the right one its column.",
  "Point with the mouse, tap, or go to the picture with Tab and move with the arrow keys. A click, a tap or Enter chooses. "
    + "The three strongest patches are numbered.",
  `The numbers are stored in 8 bits: what is drawn is the model's own number to within ${data.error.toFixed(2)}×, and nearer where it is `
    + "small. A step is one of 255 colours.",
  "Relevance is drawn without the 1 that each token has for itself. Heat maps say where the model looks, not what its answer depends on.",
  ...(covered < data.size ? [`The last ${data.size - covered} pixels on the right and at the bottom are in no patch: the model does not see them.`] : []),
  ...(data.tokenizer === "patch" ? [] : ["This model's patches come out of convolutions: each token has seen somewhat more than its square."]),
  ...data.notes,
];
byId("explanations").append(...explanations.map(text => element("li", {}, text)));
if (data.images.length < 2) byId("images").hidden = true;

readMap();
const received = heat(ALL, "looks");  // at first the patch that is looked at most
chosen = cls + [...received.keys()].slice(cls).reduce((best, token) => received[token] > received[best + cls] ? token - cls : best, 0);
lastCell = chosen - cls;
loadPicture(0);
drawImageTexts();
showMap();
let resizing;
new ResizeObserver(() => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(draw);
}).observe(byId("pointing"));
