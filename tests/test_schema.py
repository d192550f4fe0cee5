"""Every option of conf/ is in the schema, and what has no sense is refused in a line before anything is built."""

import inspect

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from litdistill.benchmarks import published_tables
from litdistill.cli.hydra_main import run_task
from litdistill.config.schema import SCHEMAS, check
from litdistill.config.schema.check import OBJECTS, schema_of
from litdistill.data.datamodule import ImageData
from litdistill.data.tensors import TensorData
from litdistill.utils.errors import UserError
from litdistill.utils.paths import CONF
from tests.composed import composed
from tests.test_configs import options

GROUPS = ["data", "optimizer", "scheduler", "trainer", "task", "compress", "callbacks", "logger", "method"]


def refused(*overrides: str, command: str = "train") -> list[str]:
    """The lines that the check of a command's config raises; none where it is taken."""
    folder = ["folder=x"] if command in ("train", "sweep") else []
    cfg = composed(command, [*folder, *overrides])
    OmegaConf.to_container(cfg, resolve=command != "sweep")  # nothing refers to what is not there
    try:
        check(cfg, command)
    except UserError as error:
        return str(error).splitlines()
    return []


# -- every key is there --------------------------------------------------------------------------------------------------


def keys(node: dict, prefix: str = ""):
    for key, value in node.items():
        yield f"{prefix}{key}", key, node
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{key}.")


@pytest.mark.parametrize("command", SCHEMAS)
def test_every_key_of_a_commands_config_has_an_entry(command):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = OmegaConf.to_container(compose(command), resolve=False)
    for key in plain:
        assert key in SCHEMAS[command].model_fields, (
            f"conf/{command}.yaml has the key {key} and the schema has none: add {key} to config/schema/ "
            "(its __init__ says where), and run python scripts/reference.py"
        )


@pytest.mark.parametrize("group", [group for group in GROUPS if group in OBJECTS])
def test_every_key_of_a_group_has_an_entry(group):
    for option in options(group):
        node = yaml.safe_load((CONF / group / f"{option}.yaml").read_text())
        if not node:  # none
            continue
        schema = schema_of(group, {"_target_": _target(group, node), **node})
        for key in node.keys() - {"defaults", "_partial_", "_target_"}:
            assert schema is None or key in schema.model_fields, (
                f"conf/{group}/{option}.yaml has the key {key} and the schema has none: add {group}.{key} to config/schema/ "
                "(its __init__ says where), and run python scripts/reference.py"
            )


def _target(group: str, node: dict) -> str:
    """The `_target_` of a file of a group, or of the first file that it is made of."""
    while "_target_" not in node:
        node = yaml.safe_load((CONF / group / f"{node['defaults'][0]}.yaml").read_text())
    return node["_target_"]


@pytest.mark.parametrize(("name", "kind"), [("ImageData", ImageData), ("diabetes", TensorData)])
def test_every_argument_of_our_data_has_an_entry(name, kind):
    schema = schema_of("data", {"_target_": f"litdistill.data.{name}"})
    set_by_functions = {"read", "name", "task", "standardize"} if kind is TensorData else set()
    missing = inspect.signature(kind).parameters.keys() - schema.model_fields.keys() - set_by_functions
    assert not missing, f"add {', '.join(missing)} to config/schema/data.py, and run python scripts/reference.py"


@pytest.mark.parametrize("group", [*GROUPS, "experiment", "sweep"])
def test_whatever_is_in_conf_is_taken(group):
    for option in options(group):
        if option == "base" and group in ("data", "sweep"):
            continue  # what the others are made of
        extra = ["data.root=x"] if option in ("folder", "shards") else []
        if group == "experiment":
            extra = ["student.checkpoint=x"] if "???" in (CONF / group / f"{option}.yaml").read_text() else []
        assert refused(f"{group}={option}", *extra, command="sweep" if group == "sweep" else "train") == [], option


def test_the_experiments_of_published_tables_are_taken():
    for name in list(published_tables.experiments())[::25]:
        assert refused(f"experiment={name}") == []


# -- what has no sense ---------------------------------------------------------------------------------------------------

WHOLE = "a whole number of 1 or more"
SENSELESS = [
    # each of them was trained with, without a word
    ("data.mean=[0.0]", "data.mean=[0.0] alone: set data.std too, to as many numbers, or both to null."),
    ("task.label_smoothing=-1", "task.label_smoothing=-1: a number of at least 0 and below 1."),
    (
        "+schedule.soft=[[0,-1],[1,1]]",
        "schedule.soft=[[0,-1],[1,1]]: a list of one or more of [epoch, factor], neither negative.",
    ),
    (
        "+schedule.soft=[[5,1],[1,0]]",
        "schedule.soft=[[5,1],[1,0]]: epochs rise from point to point, [[0, 0], [20, 1]].",
    ),
    (
        "+schedule.soft=[[0,0]]",
        "schedule.soft=[[0,0]]: every factor is 0. To leave the term out, set method.soft=0.",
    ),
    ("data.epoch_size=0", f"data.epoch_size=0: {WHOLE}, or null. Did you mean null?"),
    ("teacher.generations=0", f"teacher.generations=0: {WHOLE}."),
    ("teacher.generations=1.5", f"teacher.generations=1.5: {WHOLE}. Did you mean 2?"),
    (
        "teacher.ensemble=[]",
        "teacher.ensemble=[]: a list of one or more mappings {key: value, …}, or null. Did you mean null?",
    ),
    (
        "teacher.ensemble=[{},{recipe:{seed:0}}]",
        "teacher.ensemble=[{},{recipe:{seed:0}}]: a teacher stands there twice. Members differ, say by their seeds: "
        "[{recipe:{seed:0}},{recipe:{seed:1}}].",
    ),
    ("group=-1", f"group=-1: auto, or {WHOLE}."),
    ("student.head=old", "student.head=old: new or null."),
    (
        "student.head=new",
        "student.head=new without weights to take: set student.checkpoint, or student.head=null, which starts from nothing as "
        "a whole.",
    ),
    ("seed=1.9", "seed=1.9: a whole number from 0 to 2³² − 1. Did you mean 2?"),
    ("ema=1", "ema=1: a number of at least 0 and below 1 or null. Usual is 0.999."),
    ("optimizer.lr=0", "optimizer.lr=0: a number above 0; nothing is learned at a rate of 0. Usual is 0.001."),
    # each of them was a traceback
    ("method.hard=0 method.soft=0", "method.hard=0, method.soft=0: nothing is learned. Give one of them a weight."),
    ("optimizer.lr=-0.1", "optimizer.lr=-0.1: a number of 0 or more. Did you mean 0.1?"),
    ("ema=2", "ema=2: a number of at least 0 and below 1 or null. Usual is 0.999."),
    ("trainer.max_epochs=1.5", "trainer.max_epochs=1.5: a whole number of -1 or more, or null. Did you mean 2?"),
    ("trainer.max_epochs='2'", "trainer.max_epochs='2': a whole number of -1 or more, or null. Did you mean 2?"),
    ("data.batch_size=32.0", f"data.batch_size=32.0: {WHOLE}. Did you mean 32?"),
    ("data.per_class=2.5", f"data.per_class=2.5: {WHOLE}, or null. Did you mean 2?"),
    (
        "data.classes=[1.5,2]",
        "data.classes=[1.5,2]: a list of 2 or more classes, by number or name, or null. Did you mean [2,2]?",
    ),
    ("data.classes=[1]", "data.classes=[1]: a list of 2 or more classes, by number or name, or null."),
    ("data.classes=[cat,cat]", "data.classes=[cat,cat]: a class stands there twice."),
    ("data.fixed_views=0", f"data.fixed_views=0: {WHOLE}, or null. Did you mean null?"),
    ("data.std=[0]", "data.std=[0]: a list of one or more numbers above 0, or null."),
    ("seed=abc", "seed=abc: a whole number from 0 to 2³² − 1."),
    ("threads=0", f"threads=0: {WHOLE}, or null. Did you mean null?"),
    # and each of these was confusing
    ("optimizer.lr=inf", "optimizer.lr=inf: a number of 0 or more. Usual is 0.001."),
    ("optimizer.lr=nan", "optimizer.lr=nan: a number of 0 or more. Usual is 0.001."),
    ("method.temperature=nan", "method.temperature=nan: a finite number."),
    ("optimizer.lr='0.01'", "optimizer.lr='0.01': a number of 0 or more. Did you mean 0.01?"),
    ("data.val_size=1", "data.val_size=1: a number above 0 and below 1, or a whole number of 2 or more. Usual is 0.1."),
    # their siblings
    ("watch_test='true'", "watch_test='true': true or false. Did you mean true?"),
    ("scale.rule=lin", "scale.rule=lin: linear or sqrt. Did you mean linear?"),
    ("teacher.cache.mode=disc", "teacher.cache.mode=disc: auto, disk, memory or off. Did you mean disk?"),
    ("optimizer.weight_decay=-1", "optimizer.weight_decay=-1: a number of 0 or more."),
    (
        "trainer.limit_train_batches=0",
        f"trainer.limit_train_batches=0: {WHOLE}, or a number above 0 and at most 1, or null. Did you mean null?",
    ),
    ("trainer.max_epochs=-1", "trainer.max_epochs=-1 never ends: set trainer.max_steps or trainer.max_time too."),
    (
        "student.preprocess={mean:[0.5]}",
        "student.preprocess.mean=[0.5] alone: set student.preprocess.std too, to as many numbers, or both to null.",
    ),
    (
        "data.augment=Flip",
        "data.augment=Flip: a list of augmentations, [Flip,{Crop:{pad:4}}] or null. Did you mean [Flip]?",
    ),
    ("data.augment=[3]", "data.augment=[3]: a list of augmentations, [Flip,{Crop:{pad:4}}] or null."),
    ("+data.batchsize=3", "data.batchsize is no option: did you mean batch_size or eval_batch_size?"),
    ("+callbacks.mine=3", "callbacks.mine=3: an object {_target_: my_package.MyClass, …} or null."),
    ("compress=prune compress.budget=2", "compress.budget=2: a number above 0 and at most 1."),
    ("teacher.checkpoint=null teacher.generations=2", "teacher.generations=2 with teacher.checkpoint=null: only"),
    ("teacher=null", "KD learns from a teacher, and there is none: name one (net@teacher=conv4_wide), or train on the"),
    ("data.fraction=0.5 data.per_class=3", "data.fraction and data.per_class both choose a subset"),
]
OTHERS = [
    ("export", "", "run is to be given: run=…"),
    ("export", "run=x format=onxx", "format=onxx: onnx, pt2, safetensors or torchscript. Did you mean onnx?"),
    ("export", "run=x tolerance.agreement=2", "tolerance.agreement=2: a number from 0 to 1 or null."),
    ("export", "run=x calibration=0", f"calibration=0: {WHOLE}."),
    ("export", "run=x verify=yes", "verify=yes: true or false. Did you mean true?"),
    ("report", "threads=0", f"threads=0: {WHOLE}."),
    (
        "report",
        "epsilons=4",
        "epsilons=4: a list of whole levels from 1 to 255, of which 26 is 0.1 of the whole range. Did you mean [4]?",
    ),
    (
        "report",
        "epsilons=[0.1]",
        "epsilons=[0.1]: a list of whole levels from 1 to 255, of which 26 is 0.1 of the whole range. Did you mean [1]?",
    ),
    ("report", "runs=[]", "runs=[]: text, or a list of one or more texts."),
    ("report", "picture=main", "picture=main: the name of a .png file or null."),
    ("compare", "picture=main.svg", "picture=main.svg: the name of a .png file or null."),
    ("compare", "seeds=0", f"seeds=0: {WHOLE}."),
    ("compare", "jobs=1.5", f"jobs=1.5: {WHOLE}. Did you mean 2?"),
    ("evaluate", "run=x device=gpu", "device=gpu: auto, cpu, cuda, cuda:1 or mps."),
    ("fetch", "data.download=1", "data.download=1: true or false. Did you mean true?"),
    ("sweep", "sweep.trials=0", f"sweep.trials=0: {WHOLE}, or null. Did you mean null?"),
    ("sweep", "sweep.trials=null", "sweep.trials=null goes with sweep=grid. For tpe say how many: sweep.trials=20."),
    (
        "sweep",
        "sweep.seeds=3",
        "sweep.seeds=3: a list of one or more whole numbers from 0 to 2³² − 1, or null. Did you mean [3]?",
    ),
    ("sweep", "data.batch_size=0", f"data.batch_size=0: {WHOLE}."),
]


@pytest.mark.parametrize(("overrides", "line"), SENSELESS)
def test_an_option_without_sense_is_refused_by_name(overrides, line):
    (shown,) = refused(*overrides.split())
    assert shown == line or (line[-1] not in ".?" and shown.startswith(line))


@pytest.mark.parametrize(("command", "overrides", "line"), OTHERS)
def test_so_is_one_of_another_command(command, overrides, line):
    assert refused(*overrides.split(), command=command) == [line]


def test_a_command_says_nothing_but_the_fault(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["train.py", "ema=2"])
    with pytest.raises(SystemExit) as ended:
        run_task(lambda cfg: pytest.fail("it is taken"), "train")
    assert ended.value.code == 2
    assert capsys.readouterr().err.strip() == "ema=2: a number of at least 0 and below 1 or null. Usual is 0.999."


def test_each_fault_has_its_line():
    found = refused("ema=2", "threads=0", "data.batch_size=32.0", "+foo=1")
    assert [line.split("=")[0].split(" ")[0] for line in found] == ["ema", "threads", "foo", "data.batch_size"]


@pytest.mark.parametrize(
    "override",
    [
        "callbacks.learning_rate=null",
        "logger.tensorboard=null",
        "data.augment=null",
        "trainer.max_epochs=0",
        "ema=0.99",
    ],
)
def test_what_has_a_sense_is_taken(override):
    assert refused(override) == []


def test_an_object_of_ones_own_takes_what_it_likes():
    assert refused("+optimizer.mine=x", "+student.anything=[1,a]", "+callbacks.x={_target_:my.Thing,far:.inf}") == []
