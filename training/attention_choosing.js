"use strict";
// Follows attention_drawing.js: what is pressed, pointed at and typed, and how the page begins.

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
  const [to, from] = ["looks", "looked"].map(direction => describe(heat(chosen, direction), chosen));
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
  const label = block ? `block ${text}` : `all blocks: ${view}`;
  addRadio("views", "view", view, element("span", {}, text), label, view === shown.view, () => {
    shown.view = view;
    showMap();
  });
});
["mean", ...Array(data.heads).keys()].forEach(head => {
  const mean = head === "mean", text = mean ? "mean" : `${head + 1}`;
  addRadio("heads", "head", head, element("span", {}, text), mean ? "mean of all heads" : `head ${text}`, mean, () => {
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
byId("fit").addEventListener("change", event => {
  shown.fit = event.target.checked;
  showMap();
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
    const cell = element("div", {role: "gridcell", "aria-label": nameOf(row * side + column + cls), tabindex: -1});
    Object.assign(cell.style, {
      left: `${places[column]}%`, width: `${places[column + 1] - places[column]}%`,
      top: `${places[row]}%`, height: `${places[row + 1] - places[row]}%`,
    });
    cell.addEventListener("click", () => choose(row * side + column + cls));
    line.append(cell);
  }
  byId("cells").append(line);
}
byId("cells").addEventListener("keydown", event => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const row = Math.floor(lastCell / side), column = lastCell % side, last = side - 1;
  const moves = {
    ArrowUp: [row - 1, column], ArrowDown: [row + 1, column],
    ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
    Home: [row, 0], End: [row, last], PageUp: [0, column], PageDown: [last, column],
    Enter: [row, column], " ": [row, column],
  };
  const to = moves[event.key]?.map(place => Math.max(0, Math.min(last, place)));
  if (!to) return;
  event.preventDefault();
  choose(to[0] * side + to[1] + cls);
  document.querySelectorAll("[role=gridcell]")[lastCell].focus();
});

// A mouse shows what it points at, and chooses with a click; so does a tap.
function tokenAt(event, square) {
  const box = square.getBoundingClientRect();
  const find = share => data.edges.findIndex((edge, i) =>
    i < side && edge <= share * data.size && share * data.size < data.edges[i + 1]);
  const row = find((event.clientY - box.top) / box.height), column = find((event.clientX - box.left) / box.width);
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

// ----------------------------------------------------------------------------------------------------------- the start

const count = (number, thing) => `${number} ${thing}${number === 1 ? "" : "s"}`;
byId("model").textContent += [
  "", `${count(data.blocks, "block")} of ${count(data.model_heads, "head")}`,
  `${data.grid}×${data.grid} patches of ${data.patch}×${data.patch} pixels`,
  cls ? "with a CLS token, which the classifier reads" : "no CLS token: the classifier reads the mean of all patches",
].join(" · ");
const lost = data.size - data.edges.at(-1);
const explanations = [
  "Attention is a table: for each token (a patch, or the CLS token) how much it takes from each other one, in each "
    + "block and head. The middle picture is the row of the patch that is chosen, the right one its column.",
  "Point with the mouse, tap, or go to the picture with Tab and move with the arrow keys. A click, a tap or Enter "
    + "chooses. The three strongest patches are numbered.",
  `The numbers are stored in 8 bits: what is drawn is the model's own number to within ${data.error.toFixed(2)}×, and `
    + "nearer where it is small. A step is one of 255 colours.",
  "Relevance is drawn without the 1 that each token has for itself. Heat maps say where the model looks, not what its "
    + "answer depends on.",
  ...(lost ? [`The last ${count(lost, "pixel")} on the right and at the bottom are in no patch.`] : []),
  ...(data.tokenizer === "patch" ? [] : ["The patches come out of convolutions: each has seen more than its square."]),
  ...data.notes,
];
byId("explanations").append(...explanations.map(text => element("li", {}, text)));
if (data.images.length < 2) byId("images").hidden = true;

readMap();
const received = heat(ALL, "looks").slice(cls);  // at first the patch that is looked at most
chosen = cls + received.indexOf(Math.max(...received));
lastCell = chosen - cls;
loadPicture(0);
drawImageTexts();
showMap();
let resizing;
new ResizeObserver(() => {
  cancelAnimationFrame(resizing);
  resizing = requestAnimationFrame(draw);
}).observe(byId("pointing"));
