"""A trainer's files, patched: what changes, what stays, and what is refused. Source: specs/cotpl.md 8.7."""

import ast
import difflib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from mill_jobs.cli import mill
from mill_jobs.recipes.cotpl.names import COTPL_64
from mill_jobs.trainer.classes import ClassList, make_classes
from mill_jobs.trainer.config import BARON_TARGETS, MMDET_TARGETS
from mill_jobs.trainer.overlay import Edit, literal, make_edits, make_palette
from mill_jobs.trainer.patch import PatchRefused, patch_config, patch_configs, patch_metainfo, plan_patch
from mill_shared.coco import open_base
from mill_shared.errors import ConfigError
from mmdet_stack import baron_files, mmdet_file

FILES = ("class_embeddings_attn12.npy", "background_embeddings_attn12.npy")


def coco_classes(selected: Sequence[str]) -> ClassList:
    return make_classes(open_base(None, "coco-80", "ov-coco-48"), selected)


TWO = coco_classes(("dog", "fish", "sign"))
"""Two extras beside COCO's classes. Source: specs/cotpl.md 8.6."""


def changed_lines(before: str, after: str) -> list[str]:
    diff = difflib.unified_diff(before.splitlines(), after.splitlines(), n=0, lineterm="")
    return [line[1:].strip() for line in list(diff)[2:] if line.startswith("+")]


def baron_edits(classes: ClassList, files: Sequence[str] = FILES) -> list[Edit]:
    """As for setups that overwrite coco.py."""
    return make_edits(classes, BARON_TARGETS, files, folder="bundle", metainfo=False)


# Parity


def test_a_baron_config_gets_two_extras_and_nothing_else_changes() -> None:
    """Source: specs/cotpl.md 8.7."""
    source = "".join(baron_files())
    patched = patch_config(source.encode(), baron_edits(TWO)).decode()
    cells = [f"{weight}," for weight in TWO.class_weight[:80]]
    assert changed_lines(source, patched) == [
        "num_pls = 2",
        *(
            " ".join(cells[start : start + 20]) + ("  # COCO's order" if start == 60 else "")
            for start in range(0, 80, 20)
            if "0," in cells[start : start + 20]
        ),
        "cache = 'bundle/instances.json'",
        'bg_cls_embeddings_path="bundle/background_embeddings_attn12.npy",',
        "bg_cls_embeddings_path = 'bundle/background_embeddings_attn12.npy',",
        "cls_embeddings_path='bundle/class_embeddings_attn12.npy',  # one row a class",
        "ann_file='bundle/instances.json',",
        "'ann_file': 'bundle/instances.json',",
    ]
    assert "] + [1] * num_pls + [0.7]   # the background is last" in patched
    assert "num_classes=80 + num_pls," in patched
    comes_to: dict[str, object] = {}
    exec(patched, comes_to)
    assert comes_to["class_weight"] == TWO.class_weight
    assert len(TWO.class_weight) == 83
    assert comes_to["model"]["roi_head"]["bbox_head"]["num_classes"] == 82  # type: ignore[index]
    assert patch_config(patched.encode(), baron_edits(TWO)).decode() == patched


def test_the_shipped_classes_leave_the_reference_values_unchanged() -> None:
    """Source: specs/cotpl.md 8.7."""
    shipped = coco_classes(COTPL_64)
    weights = [int(weight) for weight in shipped.class_weight[:80]]
    source = "".join(baron_files(44, weights)).encode()
    values = [edit for edit in baron_edits(shipped) if edit.what in ("num_pls", "num_classes", "class_weight")]
    assert len(values) == 3
    assert patch_config(source, values) == source


def test_a_config_without_the_variables_is_named_with_all_that_it_lacks(tmp_path: Path) -> None:
    """Source: specs/cotpl.md 8.7."""
    with pytest.raises(PatchRefused) as refused:
        patch_config(b"model = dict(type='FasterRCNN')\n", baron_edits(TWO), "faster.py")
    assert str(refused.value).startswith("faster.py: not set there: num_pls (num_pls), num_classes (model.roi_head.")
    for what in ("class_weight", "annotations", "annotation_copies", "embeddings_attn12", "background_attn12"):
        assert f"{what} (" in str(refused.value)


def test_a_config_in_two_files_is_patched_in_both() -> None:
    model, data = baron_files()
    files = {"main.py": f"_base_ = ['./data.py']\n{model}".encode(), "data.py": data.encode()}
    with pytest.raises(PatchRefused, match=r"main.py: not set there: annotations \(train_dataloader"):
        patch_config(files["main.py"], baron_edits(TWO), "main.py")
    patched = patch_configs(files, baron_edits(TWO))
    assert patched["data.py"].count(b"'bundle/instances.json'") == 2
    assert patched["main.py"].count(b"bundle/") == 4


# Bytes


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (b"num_pls = 44", b"num_pls = 2"),
        (b"num_pls = 44\r\nx = 1\r\n", b"num_pls = 2\r\nx = 1\r\n"),
        (b"\xef\xbb\xbfnum_pls = 44 # \xc3\xa9\n", b"\xef\xbb\xbfnum_pls = 2 # \xc3\xa9\n"),
        (
            b"# coding: latin-1\ns = '\xe9'; num_pls = 44 # \xfc\n",
            b"# coding: latin-1\ns = '\xe9'; num_pls = 2 # \xfc\n",
        ),
        (b"\x0c\nx = 1\x0c\n\x0cnum_pls = 44\n\n   ", b"\x0c\nx = 1\x0c\n\x0cnum_pls = 2\n\n   "),
        (b"s = '\xe2\x80\xa8\xc2\x85'; num_pls = 44\n", b"s = '\xe2\x80\xa8\xc2\x85'; num_pls = 2\n"),
        (b"num_pls\t=\\\n\t44;y=1\n", b"num_pls\t=\\\n\t2;y=1\n"),
        (b"num_pls: int = (44)\n", b"num_pls: int = (2)\n"),
        (b"x = 1\rnum_pls = 44\r", b"x = 1\rnum_pls = 2\r"),
        (b"n = 40\nnum_pls = n + 4\n", b"n = 40\nnum_pls = 2\n"),
        (b"n = 1\nnum_pls = n + 1\n", b"n = 1\nnum_pls = n + 1\n"),
        (b"n = 44\nnum_pls = n\n", b"n = 2\nnum_pls = n\n"),
        (b"num_pls = len(names)\n", b"num_pls = 2\n"),
        (b"'\\d'\nnum_pls = 44\n", b"'\\d'\nnum_pls = 2\n"),
    ],
)
def test_only_the_value_changes_whatever_the_file_is_made_of(before: bytes, after: bytes) -> None:
    assert patch_config(before, [Edit("num_pls", ("num_pls",), 2)]) == after


@given(
    before=st.lists(
        st.sampled_from(["x = 1", "# é\u2028\u0085 ü", "s = '\U0001f600 \x0b'", "\f", "", "d = {'é': [1,\n 2]}"])
    ),
    behind=st.lists(st.sampled_from(["y = 'ß'; z = 2", "# \x1c", "   ", "\t", "t = (1,\n  # é\n  2)"])),
    indent=st.sampled_from(["a = 'é€😀'; ", "", "\f"]),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    mark=st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_every_other_byte_stays(before: list[str], behind: list[str], indent: str, newline: str, mark: bytes) -> None:
    def text(value: str) -> bytes:
        lines = [*before, f"{indent}model = dict(a=['ö', dict(num_classes={value} )], b=1) # ä", *behind]
        return mark + newline.join("\n".join(lines).split("\n")).encode()

    try:
        ast.parse(text("80").decode("utf-8-sig"))
    except SyntaxError:
        return
    edits = [Edit("num_classes", ("model.**.num_classes",), 82)]
    assert patch_config(text("80"), edits) == text("82")
    assert patch_config(text("82"), edits) == text("82")


def test_names_that_the_encoding_lacks_are_written_as_escapes() -> None:
    source = b"# coding: ascii\ntrain_dataloader = dict(dataset=dict(ann_file='a.json'))\n"
    classes = make_classes(None, ("caf\xe9", "\u732b", "it's"))
    patched = patch_config(
        source, make_edits(classes, MMDET_TARGETS.model_copy(update={"num_classes": ()}), folder="b")
    )
    comes_to: dict[str, dict[str, dict[str, dict[str, object]]]] = {}
    exec(patched, comes_to)
    assert comes_to["train_dataloader"]["dataset"]["metainfo"]["classes"] == ("caf\xe9", "\u732b", "it's")


@given(
    value=st.recursive(
        st.integers() | st.text() | st.sampled_from([0.7, 1.0]),
        lambda inner: (
            st.lists(inner)
            | st.lists(inner).map(tuple)
            | st.dictionaries(st.sampled_from(["classes", "palette", "x"]), inner)
        ),
    ),
    quote=st.sampled_from("'\""),
)
def test_a_written_value_reads_as_itself(value: object, quote: str) -> None:
    assert eval(literal(value, 7, quote)) == value


# Where values stand

CLASSES = make_classes(None, ("cat", "dog"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("model = dict(bbox_head=dict(num_classes=80))", "model = dict(bbox_head=dict(num_classes=2))"),
        (
            "model = dict(h=dict(bbox_head=[dict(num_classes=80), dict(num_classes=9)], mask_head={'num_classes': 8}))",
            "model = dict(h=dict(bbox_head=[dict(num_classes=2), dict(num_classes=2)], mask_head={'num_classes': 2}))",
        ),
        ("n = 80\nmodel = dict(bbox_head=dict(num_classes=n))", "n = 2\nmodel = dict(bbox_head=dict(num_classes=n))"),
        (
            "head = dict(num_classes=80)\nmodel = dict(neck=dict(num_classes=9), bbox_head=head)",
            "head = dict(num_classes=2)\nmodel = dict(neck=dict(num_classes=9), bbox_head=head)",
        ),
        (
            "heads = [dict(num_classes=80)]\nmodel = dict(bbox_head=heads + [*heads, dict(num_classes=7)])",
            "heads = [dict(num_classes=2)]\nmodel = dict(bbox_head=heads + [*heads, dict(num_classes=2)])",
        ),
        (
            "norm = dict(a=1)\nnorm['a'] = 2\nmodel = dict(neck=norm, bbox_head=dict(num_classes=80))",
            "norm = dict(a=1)\nnorm['a'] = 2\nmodel = dict(neck=norm, bbox_head=dict(num_classes=2))",
        ),
    ],
)
def test_places_are_found_through_lists_names_and_both_forms_of_dict(before: str, after: str) -> None:
    edits = [edit for edit in make_edits(CLASSES, MMDET_TARGETS) if edit.what == "num_classes"]
    assert patch_config(before.encode(), edits).decode() == after


@pytest.mark.parametrize(
    "expression",
    [
        "[{head}] + [1] * num_pls + [0.7]",
        "[{head}, *[1] * num_pls, 0.7]",
        "[{head}] + ([1] * num_pls + [0.7])",
        "first + num_pls * [1] + [0.7]",
    ],
)
def test_weights_keep_the_tail_that_derives_from_the_number_of_extras(expression: str) -> None:
    wanted = Edit("class_weight", ("class_weight",), TWO.class_weight)
    edits = [Edit("num_pls", ("num_pls",), 2), wanted]

    def text(num_pls: int, head: Sequence[float]) -> str:
        numbers = ", ".join(str(item) for item in head)
        first = f"first = [{numbers}]\n" if "first" in expression else ""
        return f"{first}num_pls = {num_pls}\nclass_weight = {expression.format(head=numbers)}\n"

    patched = patch_config(text(44, [1] * 80).encode(), edits).decode()
    assert patched == text(2, TWO.class_weight[:80])
    assert patch_config(patched.encode(), edits).decode() == patched


@pytest.mark.parametrize(
    "expression",
    [
        "[1] * 80 + [0.7]",
        "[1] * 10**9 + [0.7]",
        "[1] * 2000000 + [0.7]",
        "[*range(80), 0.7]",
        "[*number, 0.7]",
        "[-number, 2 - 1, 2 * 3]",
        "[1, 2] + number",
        "early + [0.7]",
        "twice + [0.7]",
        "ones[:80]",
        "[1 for _ in ones]",
        "[1.0] * 82 + (0.7,)",
        "None",
        "[dict(**ones)]",
        "[1] * 90",
    ],
)
def test_weights_that_do_not_fit_are_written_anew(expression: str) -> None:
    lines = "number = 5\ntwice = [1]\ntwice = [2]\nclass_weight = {}\nearly = [1]\n"
    patched = patch_config(
        lines.format(expression).encode(), [Edit("class_weight", ("class_weight",), TWO.class_weight)]
    )
    assert patched.decode() == lines.format(literal(TWO.class_weight, len("class_weight = ")))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("num_pls = 1\nnum_pls = 2", "num_pls is set or changed in lines 1, 2; assign it once"),
        ("num_pls = 1\nnum_pls += 2", "in lines 1, 2"),
        ("num_pls = 1\nif True:\n    num_pls = 3", "in lines 1, 3"),
        ("num_pls += 2", "config, line 1: num_pls is not plainly assigned"),
        ("num_pls, x = 1, 2", "not plainly assigned"),
        ("if True:\n    num_pls = 3", "line 2: num_pls is not plainly assigned"),
        ("for num_pls in []: pass", "not plainly assigned"),
        ("num_pls = count", "config, line 1: count is not assigned before"),
        ("from counts import count\nnum_pls = count", "count is not assigned before"),
        ("x = 1", "config: not set there: num_pls (num_pls)"),
        ("num_pls = ", "config: no Python file: invalid syntax"),
        ("# coding: utf-9\n", "config: no Python file: unknown encoding"),
        ("# coding: utf-7\nnum_pls = 1  # +AGE-", "config: its utf-7 text cannot be written back byte for byte"),
        ("num_pls = count\ncount = num_pls", "config, line 1: count is not assigned before"),
        ("count = 1\ncount = 2\nnum_pls = count", "count is set or changed in lines 1, 2"),
        ("num_pls = num_pls", "config, line 1: num_pls is not assigned before"),
    ],
)
def test_a_variable_that_is_not_assigned_once_is_refused(source: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        patch_config(source.encode(), [Edit("num_pls", ("num_pls",), 5)])
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("base = dict(x=1)\nmodel = dict(head=dict(**base))", "config, line 2: the dict takes entries from elsewhere"),
        ("base = dict(x=1)\nmodel = {**base, 'head': 1}", "line 2: the dict takes entries from elsewhere"),
        ("base = dict(x=1)\nmodel = dict(base, head=dict(n=1))", "line 2: the dict takes entries from elsewhere"),
        ("model = dict(head=dict(n=1))\nmodel['head']['n'] = 2", "model is set or changed in lines 1, 2"),
        ("model = dict(head=dict(n=1))\nmodel.update(head=3)", "model is set or changed in lines 1, 2"),
        ("head = dict(n=1)\nhead['n'] = 2\nmodel = dict(head=head)", "head is set or changed in lines 1, 2"),
        ("n = 3\nmodel = dict(head=dict(n=n), m=n)", "n shares a variable with another value"),
    ],
)
def test_what_may_hide_a_value_is_refused(source: str, message: str) -> None:
    with pytest.raises(PatchRefused) as refused:
        patch_config(
            source.encode(), [Edit("n", ("model.head.n",), 5), Edit("m", ("model.m",), 6)][: 1 + ("m=n" in source)]
        )
    assert message in str(refused.value)


# mmdetection's coco.py


def test_mmdetections_own_class_list_is_patched_and_the_rest_stays() -> None:
    source = mmdet_file("datasets/coco.py").read_bytes()
    patched = patch_metainfo(source, TWO)
    metainfo = read_metainfo(patched)
    assert metainfo["classes"] == tuple(entry.name for entry in TWO.classes)
    assert len(metainfo["palette"]) == len(TWO.classes) == 82
    assert metainfo["palette"][:80] == read_metainfo(source)["palette"]
    assert patch_metainfo(patched, TWO) == patched
    assert patch_metainfo(source, coco_classes(())) == source
    head, tail = b"        'classes':\n        ", b"\n    }\n    COCOAPI = COCO"
    assert patched.partition(head)[0] == source.partition(head)[0]
    assert patched.partition(tail)[2] == source.partition(tail)[2]
    assert b"\n        # palette is a list of color tuples, which is used for visualization.\n" in patched
    assert max(len(line) for line in patched.splitlines()) <= 80


def read_metainfo(source: bytes) -> dict[str, Sequence[object]]:
    found = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign) and "METAINFO" in ast.dump(node)
    ]
    value: dict[str, Sequence[object]] = ast.literal_eval(found[0].value)
    return value


@pytest.mark.parametrize("metainfo", ["dict(classes=('a',))", "{\n  'classes': ('a',),\n  # 'palette': [],\n}"])
def test_a_missing_palette_is_added(metainfo: str) -> None:
    source = f"class CocoDataset:\n    METAINFO = {metainfo}\n".encode()
    comes_to: dict[str, Any] = {}
    exec(patch_metainfo(source, CLASSES), comes_to)
    expected = {"classes": ("cat", "dog"), "palette": make_palette(2)}
    assert comes_to["CocoDataset"].METAINFO.items() == expected.items()


@pytest.mark.parametrize(
    "source",
    [
        "x = 1",
        "class CocoDataset:\n    METAINFO = {'palette': []}",
        "class LVISDataset:\n    METAINFO = {'classes': ()}",
        "class CocoDataset:\n    METAINFO = {'classes': ()}\n    METAINFO = {'classes': ()}",
    ],
)
def test_another_file_is_no_metainfo(source: str) -> None:
    with pytest.raises(PatchRefused, match=r"coco.py: CocoDataset.METAINFO is not one dict"):
        patch_metainfo(source.encode(), TWO)


def test_colours_are_distinct_and_do_not_depend_on_what_follows() -> None:
    palette = make_palette(300)
    assert len(set(palette)) == 300
    assert palette[:80] == make_palette(80)
    assert all(0 <= part <= 255 for colour in palette for part in colour)


# In place


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = tmp_path / "bundle"
    folder.mkdir()
    (folder / "classes.json").write_bytes(TWO.to_json())
    for name in FILES:
        (folder / name).touch()
    return folder


def test_the_command_patches_all_files_in_place_once(bundle: Path, tmp_path: Path) -> None:
    model, data = baron_files()
    main, base, coco = tmp_path / "main.py", tmp_path / "data.py", tmp_path / "coco.py"
    main.write_text(model)
    main.chmod(0o640)
    (tmp_path / "link.py").symlink_to(base)
    base.write_text(data)
    coco.write_bytes(mmdet_file("datasets/coco.py").read_bytes())
    link = tmp_path / "link.py"
    arguments = ["patch", str(bundle), str(main), str(link), "--kind", "baron", "--metainfo", str(coco)]
    looked = CliRunner().invoke(mill, [*arguments, "--check"])
    assert looked.exit_code == 1
    assert looked.output.count("would change") == 3
    assert main.read_text() == model
    done = CliRunner().invoke(mill, arguments)
    assert (done.exit_code, done.output.count(": patched")) == (0, 3)
    assert f"ann_file='{bundle}/instances.json'" in base.read_text()
    assert "metainfo" not in base.read_text()
    assert b"'fish'" in coco.read_bytes()
    assert link.is_symlink()
    assert main.stat().st_mode & 0o777 == 0o640
    again = CliRunner().invoke(mill, [*arguments, "--check"])
    assert (again.exit_code, again.output) == (0, "nothing to change\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "coco.py", "data.py", "link.py", "main.py"]


def test_the_command_leaves_all_files_alone_when_one_cannot_be_patched(bundle: Path, tmp_path: Path) -> None:
    model, data = baron_files()
    main, base = tmp_path / "main.py", tmp_path / "data.py"
    main.write_text(model)
    base.write_text(data.replace("datasets=[det_dataset, ovd_dataset]", "datasets=[dict(**det_dataset)]"))
    done = CliRunner().invoke(mill, ["patch", str(bundle), str(main), str(base), "--kind", "baron"])
    assert isinstance(done.exception, PatchRefused)
    assert main.read_text() == model


def test_the_command_takes_the_trainer_from_the_manifest(bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text("heads = 9\ntrain_dataloader = dict(ann_file='a')\n")
    targets = {"num_classes": ["heads"], "annotations": ["train_dataloader.ann_file"]}
    manifest = {"finalize": {"finalize": {"trainer": {"kind": "mmdet", "targets": targets}}}, "files": []}
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    assert CliRunner().invoke(mill, ["patch", str(bundle), str(config)]).exit_code == 0
    assert config.read_text().startswith("heads = 82\ntrain_dataloader = dict(metainfo=dict(classes=(")


@pytest.mark.parametrize(
    ("manifest", "message"),
    [("{", "manifest.json: "), ('{"finalize": {"finalize": {"trainer": {"kind": "yolo"}}}}', "Input tag 'yolo'")],
)
def test_a_broken_manifest_is_named(bundle: Path, tmp_path: Path, manifest: str, message: str) -> None:
    (bundle / "manifest.json").write_text(manifest)
    config = tmp_path / "config.py"
    config.touch()
    ended = CliRunner().invoke(mill, ["patch", str(bundle), str(config)])
    assert isinstance(ended.exception, ConfigError)
    assert message in str(ended.exception)
    assert "fetch the bundle again" in str(ended.exception)


def test_a_folder_without_classes_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"classes.json: cannot be read \(No such file"):
        plan_patch(tmp_path, [], BARON_TARGETS, None)


@pytest.mark.parametrize("manifest", [None, '{"finalize": {"finalize": {}}}'])
def test_a_bundle_for_no_trainer_needs_a_kind(bundle: Path, tmp_path: Path, manifest: str | None) -> None:
    if manifest is not None:
        (bundle / "manifest.json").write_text(manifest)
    config = tmp_path / "config.py"
    config.touch()
    ended = CliRunner().invoke(mill, ["patch", str(bundle), str(config)])
    assert isinstance(ended.exception, ConfigError)
    assert "say --kind mmdet or --kind baron" in str(ended.exception)


def test_without_a_patched_coco_py_the_datasets_get_the_classes(bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.py"
    config.write_text("".join(baron_files()))
    [patched] = plan_patch(bundle, [config], BARON_TARGETS, None).values()
    comes_to: dict[str, dict[str, object]] = {}
    exec(patched, comes_to)
    for name in ("det_dataset", "ovd_dataset"):
        metainfo = {"classes": tuple(entry.name for entry in TWO.classes), "palette": make_palette(82)}
        assert comes_to[name]["metainfo"] == metainfo
