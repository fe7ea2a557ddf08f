"""The page to look at attention: what it draws against what the model computes, in Chromium without a network."""

import base64
import json
import math
import re
import shutil
import time

import matplotlib
import numpy as np
import pytest
import torch
from axe_core_python.selenium import Axe
from helpers import ROOT, committed_results
from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys

import explain
from network import CNN, VisionTransformer
from training import attention_page
from training.heatmaps import relevance_of_tokens, roll_out
from training.trained import load_model, read_sheet

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()
NORMALISATION = {"mean": [0.49, 0.48, 0.45], "std": [0.25, 0.24, 0.26]}
KINDS = {  # every kind of ViT that the page must work for
    "mean": dict(pooling="mean"),
    "cls, patches that do not divide": dict(pooling="cls", patch_size=6),
    "conv, two classes": dict(pooling="mean", tokenizer="conv", patch_size=8, output_size=2),
    "whitened, one head, larger": dict(pooling="cls", tokenizer="whitened", patch_size=16, img_size=80, num_heads=1),
    "one patch": dict(pooling="mean", patch_size=32, num_blocks=1),
}


def vit(classes=None, **options) -> VisionTransformer:
    """A small ViT with attention that is far from uniform, and metadata as train.py writes them."""
    torch.manual_seed(0)
    model = VisionTransformer(**{"hidden_size": 32, "num_heads": 2, "num_blocks": 2, **options}).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.query_key_value.weight.mul_(3)
        model.head.weight.normal_()
    classes = classes or (["truck", "cat"] if options.get("output_size") == 2 else CIFAR10)
    model.metadata = {"dataset": "cifar10", "classes": classes, **NORMALISATION}
    return model


def noise(model, count=3) -> torch.Tensor:
    """Images in large blots: uint8 `(n, 3, size, size)`."""
    blots = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(1))
    return (255 * torch.nn.functional.interpolate(blots, model.image_size)).to(torch.uint8)


def maps_by_hand(model, pixels) -> dict:
    """Attention `(blocks, heads, tokens, tokens)`, rollout and relevance of one image, in multiples of uniform."""
    mean, std = (torch.tensor(model.metadata[name]).view(3, 1, 1) for name in ("mean", "std"))
    image = ((pixels.float() / 255 - mean) / std)[None]
    with torch.no_grad():
        output = model(image, return_attention=True)
    weights = output["attention_weights"]
    tokens = weights.shape[-1]
    relevance = relevance_of_tokens(model, image)[0] - torch.eye(tokens)
    return {
        "attention": (tokens * weights[:, 0]).double().numpy(),
        "rollout": (tokens * roll_out(weights)[0]).double().numpy(),
        "relevance": (relevance / relevance.mean()).double().numpy(),
        "probabilities": output["logits"][0].softmax(dim=0).tolist(),
    }


@pytest.fixture(scope="module")
def chromium():
    """A headless Chromium that has no network."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if binary is None or driver is None:
        lacking = "Chromium" if binary is None else "chromedriver"
        pytest.skip(f"needs {lacking}: on Debian, apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--force-prefers-reduced-motion"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options, webdriver.ChromeService(driver))
    nothing = {"offline": True, "latency": 0, "downloadThroughput": 0, "uploadThroughput": 0}
    browser.execute_cdp_cmd("Network.enable", {})
    browser.execute_cdp_cmd("Network.emulateNetworkConditions", nothing)
    yield browser
    browser.quit()


@pytest.fixture
def show(chromium):
    """Opens a page from the disk at a width in CSS pixels, light or dark, and waits until its picture is drawn."""

    def show(path, width=1280, theme="light"):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"features": [{"name": "prefers-color-scheme", "value": theme}]}
        chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", scheme)
        chromium.get(path.as_uri())
        wait(lambda: chromium.execute_script("return !!pictures[0].color"))
        return chromium

    yield show
    errors = [entry["message"] for entry in chromium.get_log("browser") if entry["level"] == "SEVERE"]
    assert not errors, "errors, or something that the page's own policy forbids"


def wait(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def choose(browser, name, value):
    """Press the label of a radio button."""
    browser.find_element(By.CSS_SELECTOR, f"label:has(> input[name={name}][value='{value}'])").click()


def cell(browser, number):
    return browser.find_elements(By.CSS_SELECTOR, "[role=gridcell]")[number]


def only_heat(browser):
    browser.execute_script(
        "slider = document.getElementById('opacity'); slider.value = 100; slider.dispatchEvent(new Event('input'))"
    )


# The colour inside each square, away from the ring around it and the number in its middle.
READ_COLORS = """
const canvas = document.getElementById(arguments[0]), edges = arguments[1], unit = canvas.width / arguments[2];
const context = canvas.getContext("2d"), found = [];
for (let row = 0; row + 1 < edges.length; row++)
  for (let column = 0; column + 1 < edges.length; column++) {
    const x = edges[column] + 0.2 * (edges[column + 1] - edges[column]);
    const y = edges[row] + 0.8 * (edges[row + 1] - edges[row]);
    found.push([...context.getImageData(Math.floor(x * unit), Math.floor(y * unit), 1, 1).data]);
  }
return found;
"""
INFERNO = [tuple(color) for color in matplotlib.colormaps["inferno"](range(256), bytes=True).tolist()]


def drawn(browser, canvas, model) -> np.ndarray:
    """Places on the scale of 256 colours of each patch."""
    colors = browser.execute_script(READ_COLORS, canvas, attention_page.edges(model), model.image_size)
    return np.array([INFERNO.index(tuple(color)) for color in colors])


def table(browser, number) -> np.ndarray:
    """The numbers of one of the two tables."""
    texts = browser.execute_script(
        "return [...document.querySelectorAll('table')[arguments[0]].querySelectorAll('td')].map(x => x.textContent)",
        number,
    )
    return np.array([float(text) for text in texts if text])


def texts(browser, selector) -> list[str]:
    return [" ".join(found.text.split()) for found in browser.find_elements(By.CSS_SELECTOR, selector)]


# ---------------------------------------------------------------------------------------------------- what it draws


@pytest.mark.parametrize("kind", KINDS)
def test_pointing_at_a_patch_draws_its_attention(tmp_path, show, kind):
    model = vit(**KINDS[kind])
    pixels = noise(model)
    notes = attention_page.write_page(model, pixels, tmp_path / "page.html", torch.tensor([0, 1, 1]))
    assert notes == []
    maps = maps_by_hand(model, pixels[1])
    cls, heads = int(model.pooling == "cls"), model.config["num_heads"]
    browser = show(tmp_path / "page.html")
    choose(browser, "image", 1)
    only_heat(browser)
    browser.find_element(By.CSS_SELECTOR, "#numbers summary").click()
    error = browser.execute_script("return data.error")
    patch = (model.embedding.grid_size**2 - 1) * 2 // 3
    seen = {"rollout": maps["rollout"], "relevance": maps["relevance"], (0, "mean"): maps["attention"][0].mean(axis=0)}
    if heads > 1:
        seen |= {(block, 1): maps["attention"][block, 1] for block in range(model.config["num_blocks"])}
    for view, expected in seen.items():
        choose(browser, "view", view if isinstance(view, str) else view[0])
        if not isinstance(view, str) and heads > 1:
            choose(browser, "head", view[1])
        square = cell(browser, patch)
        ActionChains(browser).move_to_element(square).perform()  # as a mouse does; nothing is pressed
        assert browser.execute_script("return pointed") == patch + cls
        top = max(2, expected.max())
        for number, (canvas, row) in enumerate(
            {"looks": expected[patch + cls], "looked": expected[:, patch + cls]}.items()
        ):
            row = row[cls:]
            places = 255 * np.sqrt(row / top)
            if isinstance(view, str) or view[1] != "mean":  # half a step stored, half a step drawn
                assert np.abs(drawn(browser, canvas, model) - places).max() < 1.01, (view, canvas)
            shown = table(browser, number)
            assert np.abs(shown - row).max() <= error + 0.0051, (view, canvas)
            assert shown.shape == row.shape
    browser.find_element(By.ID, "fit").click()  # the scale of this patch alone
    ActionChains(browser).move_to_element(square).perform()
    row, column = expected[patch + cls, cls:], expected[:, patch + cls]
    top, stored_step = max(2, column.max(), expected[patch + cls].max()), 0.5 * math.sqrt(expected.max())
    for canvas, values in (("looks", row), ("looked", column[cls:])):
        places = 255 * np.sqrt(values / top)
        assert np.abs(drawn(browser, canvas, model) - places).max() < 0.51 + stored_step / math.sqrt(top) + 0.01
    assert error < 0.005 * max(expected.max() for expected in [*maps["attention"], maps["rollout"], maps["relevance"]])


def test_what_the_classifier_reads_can_be_pointed_at(tmp_path, show):
    model = vit(pooling="cls", patch_size=8)
    pixels = noise(model, 1)
    attention_page.write_page(model, pixels, tmp_path / "cls.html", names=["a.jpg"])
    last = maps_by_hand(model, pixels[0])["attention"][-1].mean(axis=0)
    browser = show(tmp_path / "cls.html")
    button = browser.find_element(By.ID, "special")
    assert button.text == "CLS token"
    button.click()
    assert texts(browser, "#looks-title, #looked-title") == ["Where the CLS token looks", "Who looks at the CLS token"]
    assert button.get_attribute("aria-pressed") == "true"
    only_heat(browser)
    places = 255 * np.sqrt(last[0, 1:] / max(2, last.max()))
    assert np.abs(drawn(browser, "looks", model) - places).max() < 2
    assert texts(browser, "#looks-special") == [f"CLS token {last[0, 0]:.1f}×"]

    model = vit(pooling="mean", patch_size=8)
    attention_page.write_page(model, pixels, tmp_path / "mean.html", names=["a.jpg"])
    last = maps_by_hand(model, pixels[0])["attention"][-1].mean(axis=0)
    browser = show(tmp_path / "mean.html")
    browser.find_element(By.ID, "special").click()
    only_heat(browser)
    received = last.mean(axis=0)  # as figures/attention_maps.png shows it
    assert np.abs(drawn(browser, "looks", model) - 255 * np.sqrt(received / max(2, last.max()))).max() < 2
    best = int(received.argmax())
    assert texts(browser, "#looks-list li")[0] == f"1 row {best // 4 + 1}, column {best % 4 + 1} {received[best]:.1f}×"


def test_predictions_with_probabilities(tmp_path, show):
    model = vit()
    pixels = noise(model, 2)
    wanted = [maps_by_hand(model, image)["probabilities"] for image in pixels]
    best = [int(np.argmax(row)) for row in wanted]
    labels = torch.tensor([best[0], (best[1] + 1) % 10])
    attention_page.write_page(model, pixels, tmp_path / "page.html", labels)
    browser = show(tmp_path / "page.html")
    for i in range(2):
        choose(browser, "image", i)
        rows = [re.fullmatch(r"(\w+)( ✓)? (\S+) %", row).groups() for row in texts(browser, "#bars li")]
        percents = {name: float(percent) for name, _, percent in rows}
        assert rows[0][0] == CIFAR10[best[i]] and list(percents.values()) == sorted(percents.values(), reverse=True)
        assert [name for name, mark, _ in rows if mark] == [CIFAR10[labels[i]]]
        assert all(abs(percents[name] - 100 * p) < 0.51 for name, p in zip(CIFAR10, wanted[i], strict=True))
        right = i == 0
        assert ("right" in texts(browser, "#verdict")[0]) == right
        assert ("wrong, it is: " + CIFAR10[labels[i]] in texts(browser, "#verdict")[0]) != right
    names = [x.accessible_name for x in browser.find_elements(By.CSS_SELECTOR, "#images input")]
    assert names == [f"1: {CIFAR10[labels[0]]}", f"2: {CIFAR10[labels[1]]}, wrong: {CIFAR10[best[1]]}"]


def test_names_and_classes_are_shown_as_they_are_and_not_run(tmp_path, show):
    evil = "</script><script>document.title='gone'</script><img src=x onerror=\"document.title='gone'\">"
    classes = [evil, "{{data}}", "<!--", *CIFAR10[3:]]
    model = vit(classes)
    attention_page.write_page(model, noise(model, 1), tmp_path / "page.html", names=[f"<script>{{{{css}}}}&amp;{evil}"])
    browser = show(tmp_path / "page.html")
    assert browser.title.startswith("Where does it look?") and len(browser.find_elements(By.TAG_NAME, "script")) == 3
    assert texts(browser, "#picture-title") == [f"<script>{{{{css}}}}&amp;{evil}"]
    assert any(row.startswith(evil) for row in texts(browser, "#bars li"))
    assert not browser.find_element(By.ID, "images").is_displayed()  # of one picture there is nothing to choose


def test_a_long_name_does_not_make_the_page_wider(tmp_path, show):
    model = vit([200 * "x", *CIFAR10[1:]])
    attention_page.write_page(model, noise(model), tmp_path / "page.html", labels=torch.tensor([0, 1, 2]))
    browser = show(tmp_path / "page.html")
    assert not browser.execute_script("return document.documentElement.scrollWidth > innerWidth")


# ----------------------------------------------------------------------------------------------------- how it is used


def test_all_of_it_by_keyboard(tmp_path, show):
    model = vit(pooling="cls", patch_size=8)
    attention_page.write_page(model, noise(model), tmp_path / "page.html", torch.tensor([0, 1, 2]))
    browser = show(tmp_path / "page.html")
    visited = []
    for _ in range(13):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        active = browser.switch_to.active_element
        group = browser.execute_script("return arguments[0].closest('fieldset, [role=grid], details, [id]').id", active)
        visited.append(group or active.get_attribute("id"))
        outline = "const x = arguments[0], y = x.nextElementSibling; "
        outline += "return getComputedStyle(x.type === 'radio' ? y : x).outlineWidth"
        assert browser.execute_script(outline, active) != "0px", f"{visited[-1]} does not show that it has the focus"
        if active.get_attribute("role") == "gridcell":
            break
    assert visited == ["themes", "images", "views", "heads", "opacity", "fit", "cells"]
    ActionChains(browser).send_keys(Keys.HOME, Keys.PAGE_UP).perform()
    assert browser.execute_script("return chosen") == 1  # after the CLS token
    ActionChains(browser).send_keys(
        Keys.ARROW_RIGHT, Keys.ARROW_DOWN, Keys.ARROW_DOWN, Keys.ARROW_LEFT, Keys.ARROW_LEFT
    ).perform()
    assert browser.execute_script("return chosen") == 1 + 2 * 4
    assert browser.switch_to.active_element.accessible_name == "row 3, column 1"
    assert browser.switch_to.active_element.get_attribute("aria-selected") == "true"
    said = browser.find_element(By.ID, "announcement")
    assert said.get_attribute("aria-live") == "polite"
    first = texts(browser, "#looks-list li")[0].removeprefix("1 ")
    place, times = re.fullmatch(r"(.*) (\S+×)", first).groups()
    wait(lambda: f"Row 3, column 1. Looks most at {place}, {times}; " in said.get_attribute("textContent"))
    ActionChains(browser).send_keys(Keys.TAB, Keys.ENTER).perform()
    assert browser.execute_script("return chosen") == 0 and browser.switch_to.active_element.text == "CLS token"
    wait(lambda: "CLS token. Looks most at" in said.get_attribute("textContent"))
    browser.find_element(By.CSS_SELECTOR, "[name=view]:checked").send_keys(Keys.ARROW_RIGHT)
    assert "Rollout" in texts(browser, "#caption")[0] and not browser.find_element(By.ID, "heads").is_displayed()


def test_a_mouse_shows_and_a_click_or_a_tap_chooses(tmp_path, show):
    model = vit(pooling="mean", patch_size=8)
    attention_page.write_page(model, noise(model, 1), tmp_path / "page.html", torch.tensor([0]))
    browser = show(tmp_path / "page.html", width=390)
    state = "return [chosen, pointed]"
    before = browser.execute_script("return chosen")
    ActionChains(browser).move_to_element(cell(browser, 6)).perform()
    assert browser.execute_script(state) == [before, 6]
    ActionChains(browser).move_to_element(browser.find_element(By.TAG_NAME, "h1")).perform()
    assert browser.execute_script(state) == [before, None]
    ActionChains(browser).click(cell(browser, 9)).perform()
    assert browser.execute_script("return chosen") == 9
    looked = browser.find_element(By.ID, "looked")  # pointing works in all three pictures
    ActionChains(browser).move_to_element_with_offset(looked, 5, 5).click().perform()
    assert browser.execute_script("return chosen") == 10
    box = browser.execute_script("const b = arguments[0].getBoundingClientRect(); return [b.x, b.y]", cell(browser, 3))
    browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": True})
    try:
        finger = [{"x": box[0] + 20, "y": box[1] + 20}]
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchStart", "touchPoints": finger})
        browser.execute_cdp_cmd("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
        wait(lambda: browser.execute_script("return chosen") == 3)
    finally:
        browser.execute_cdp_cmd("Emulation.setTouchEmulationEnabled", {"enabled": False})


def test_light_and_dark(tmp_path, show):
    model = vit(patch_size=16)
    attention_page.write_page(model, noise(model, 1), tmp_path / "page.html", torch.tensor([0]))

    def brightness():
        color = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        return sum(map(int, re.findall(r"\d+", color)[:3])) / 3

    browser = show(tmp_path / "page.html", theme="dark")
    assert brightness() < 60
    choose(browser, "theme", "light")
    assert brightness() > 200
    browser = show(tmp_path / "page.html", theme="light")
    assert brightness() > 200
    choose(browser, "theme", "dark")
    assert brightness() < 60


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_no_serious_fault_for_axe_and_no_scrolling_sideways(tmp_path, show, width, theme):
    model = vit(
        pooling="cls",
        num_blocks=12,
        num_heads=8,
        output_size=30,
        patch_size=4,
        classes=[f"class {i}" * 3 for i in range(30)],
    )
    attention_page.write_page(model, noise(model, 2), tmp_path / "page.html", torch.tensor([0, 1]))
    browser = show(tmp_path / "page.html", width, theme)
    for summary in browser.find_elements(By.TAG_NAME, "summary"):
        summary.click()
    found = Axe().run(browser)
    faults = [(x["id"], x["impact"], [n["html"] for n in x["nodes"]][:3]) for x in found["violations"]]
    assert not faults and len(found["passes"]) > 20
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_nothing_is_loaded_from_elsewhere(tmp_path, show):
    model = vit()
    attention_page.write_page(model, noise(model, 2), tmp_path / "page.html", torch.tensor([0, 1]))
    browser = show(tmp_path / "page.html")
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(x => x.name)")
    assert all(name.startswith("data:") for name in loaded)
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in text and not re.search(r"https?:|@import|url\(", text)


# -------------------------------------------------------------------------------------------------------- its size


def stored(path) -> dict:
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="data">(.*)</script>', text)[1])


def unpack(data, i) -> np.ndarray:
    """All maps of one image, `(maps, tokens, tokens)`."""
    tokens = (len(data["edges"]) - 1) ** 2 + data["cls"]
    maps = np.frombuffer(base64.b64decode(data["images"][i]["maps"]), np.uint8).reshape(-1, tokens, tokens)
    return np.array(data["images"][i]["largest"])[:, None, None] * (maps / 255) ** 2


def test_24_images_of_small_patches_fit(tmp_path):
    model = vit(pooling="cls", patch_size=2, num_blocks=4, num_heads=4)
    notes = attention_page.write_page(model, noise(model, 24), tmp_path / "page.html", torch.arange(24) % 10)
    assert 2_000_000 < (tmp_path / "page.html").stat().st_size < 3_000_000
    data = stored(tmp_path / "page.html")
    needed = 24 * (4 * 4 + 2) * 257**2 * 4 / 3 / 1e6
    assert (
        notes
        == data["notes"]
        == [
            f"Each head's attention would take {needed:.1f} MB: here is the mean of a block's heads.",
            f"There was room for {len(data['images'])} of 24 images.",
        ]
    )
    assert data["heads"] == 1 and 4 <= len(data["images"]) <= 6 and max(map(len, notes)) < 80


def test_joined_patches_are_means(tmp_path, show):
    model = vit(pooling="cls", patch_size=4, num_blocks=1, img_size=20)  # 5x5 patches in 3x3 squares
    pixels = noise(model, 2)
    pictures, wanted = [attention_page.picture_address(image) for image in pixels], attention_page.Storage(1, False, 2)
    limit = next(x for x in range(30_000, 90_000, 100) if attention_page.choose_storage(model, pictures, x) == wanted)
    notes = attention_page.write_page(model, pixels, tmp_path / "page.html", limit=limit, names=["a", "b"])
    assert "The 25 patches are joined in squares of 2x2, by their means." in notes
    data = stored(tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size <= limit
    assert data["edges"] == [0, 8, 16, 20] and len(data["images"]) == 1
    weights = maps_by_hand(model, pixels[0])["attention"][0].mean(axis=0)
    expected = np.zeros((10, 10))
    groups = [[0]] + [
        [1 + 5 * i + j for i in rows for j in columns]
        for rows in ((0, 1), (2, 3), (4,))
        for columns in ((0, 1), (2, 3), (4,))
    ]
    for a, rows in enumerate(groups):
        for b, columns in enumerate(groups):
            expected[a, b] = weights[np.ix_(rows, columns)].mean()
    assert np.abs(unpack(data, 0)[0] - expected).max() <= data["error"] + 1e-6
    browser = show(tmp_path / "page.html")
    browser.find_element(By.CSS_SELECTOR, "#numbers summary").click()
    ActionChains(browser).move_to_element(cell(browser, 8)).perform()
    assert np.abs(table(browser, 0) - expected[9, 1:]).max() <= data["error"] + 0.0051


# ------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def run(capsys, tmp_path):
    """explain.py with `--output_dir` in this process: exit code, stdout and its lines of error."""

    def run(*arguments):
        code = 0
        try:
            explain.main([*map(str, arguments), "--output_dir", str(tmp_path / "figures")])
        except SystemExit as stop:
            code = stop.code
        output = capsys.readouterr()
        return code, output.out, [line for line in output.err.splitlines() if "error:" in line]

    return run


def test_the_command_without_pictures_shows_24_test_images(tmp_path, run, monkeypatch):
    monkeypatch.setattr(explain, "home", lambda: tmp_path)
    model = vit(patch_size=8)
    pages = {"other": "VisionTransformer_attention.html", "saved": "attention.html"}  # by the folder of the model
    for folder, page in pages.items():
        model.save(tmp_path / folder / "VisionTransformer.pt", **model.metadata)
        code, out, _ = run(tmp_path / folder / "VisionTransformer.pt", "--page")
        assert code == 0 and page in out
    assert {path.name for path in (tmp_path / "figures").iterdir()} == set(pages.values())
    data = stored(tmp_path / "figures" / "attention.html")
    labels = [image["label"] for image in data["images"]]
    assert labels == [*range(10), *range(10), 0, 1, 2, 3]
    sheet, of_sheet = read_sheet()
    second_cat = sheet[of_sheet == 3][1]
    assert data["images"][13]["picture"] == attention_page.picture_address(second_cat)
    assert (
        np.abs(unpack(data, 13)[0] - maps_by_hand(model, second_cat)["attention"][0, 0]).max() <= data["error"] + 1e-5
    )


def test_the_command_with_pictures(tmp_path, run):
    model = vit(patch_size=8)
    model.save(tmp_path / "mine.pt", **model.metadata)
    Image.new("RGB", (90, 50), "red").save(tmp_path / "a.jpg")
    (tmp_path / "more").mkdir()
    Image.new("RGB", (40, 70), "blue").save(tmp_path / "more" / "b.png")
    (tmp_path / "empty").mkdir()
    pictures = [tmp_path / "a.jpg", tmp_path / "more", tmp_path / "empty"]
    code, _, errors = run("--checkpoint", tmp_path / "mine.pt", "--page", *pictures, tmp_path / "none.png")
    assert code == 2 and len(errors) == 1 and "none.png" in errors[0] and "empty" in errors[0]  # the others are drawn
    data = stored(tmp_path / "figures" / "mine_attention.html")
    assert [(image["name"], image["label"]) for image in data["images"]] == [("a.jpg", -1), ("b.png", -1)]


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (["none.jpg"], "No such file"),
        (["text.jpg", "none.jpg"], "not an image"),
        (["red.jpg", "other.pt"], "other.pt is a model, not a picture"),
        (["empty"], "empty"),
        (["red.jpg", "--rows", "3"], "does nothing with --rows"),
    ],
)
def test_a_picture_that_cannot_be_shown_is_one_line_and_no_page(tmp_path, run, monkeypatch, page, words):
    monkeypatch.chdir(tmp_path)
    vit(patch_size=8).save("mine.pt", **vit().metadata)
    Image.new("RGB", (9, 9)).save("red.jpg")
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty").mkdir()
    code, _, errors = run("mine.pt", "--page", *page)
    assert code == 2 and len(errors) == 1 and words in errors[0]
    assert not (tmp_path / "figures").exists()


def test_a_model_without_attention_is_refused(tmp_path, run):
    CNN().save(tmp_path / "CNN.pt", **vit().metadata)
    code, _, errors = run(tmp_path / "CNN.pt", "--page")
    assert code == 2 and len(errors) == 1 and "CNN.pt has no attention" in errors[0]
    assert not (tmp_path / "figures").exists()


@committed_results
def test_the_committed_page_is_of_the_committed_model_and_of_this_code():
    path, again = ROOT / "figures" / "attention.html", "write it again: python explain.py --page"
    page = path.read_text(encoding="utf-8")
    assert path.stat().st_size < 3_000_000
    assert all(text in page for part, text in attention_page.read_parts().items() if part != "html"), again
    data, model = stored(path), load_model(ROOT / "saved" / "VisionTransformer.pt")
    assert data["notes"] == [] and len(data["images"]) == 24 and data["heads"] == model.config["num_heads"], again
    sheet, of_sheet = read_sheet()
    for i in (0, 12):
        maps = maps_by_hand(model, sheet[of_sheet == data["images"][i]["label"]][i // 10])
        expected = np.concatenate([maps["attention"].reshape(-1, *maps["rollout"].shape), [maps["rollout"]]])
        shown = unpack(data, i)[: len(expected)]
        largest = expected.max(axis=(1, 2), keepdims=True)
        assert np.abs(np.sqrt(shown / largest) - np.sqrt(expected / largest)).max() < 1 / 255, (
            again
        )  # half a step, and rounding
        assert math.isclose(sum(data["images"][i]["probabilities"]), 1, abs_tol=1e-3)
