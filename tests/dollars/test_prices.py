"""Prices: dated rows of YAML files and SkyPilot catalogs, and which of them a node of the cluster is."""

from pathlib import Path

import pytest
import yaml

from pipelines.dollars.prices import NodePrice, Price, find_instance, load_prices, price_node
from pipelines.errors import UserError
from tests.conftest import REPOSITORY

CATALOG = """InstanceType,AcceleratorName,AcceleratorCount,vCPUs,Price,Region,GpuInfo,SpotPrice,AvailabilityZone
g6.xlarge,L4,1.0,4.0,0.8048,us-east-1,"{'Gpus': [{'Name': 'L4'}]}",0.31,us-east-1a
g6.xlarge,L4,1.0,4.0,0.8048,us-east-1,"{'Gpus': [{'Name': 'L4'}]}",0.35,us-east-1b
g6.xlarge,L4,1.0,4.0,0.9,eu-west-1,"{'Gpus': [{'Name': 'L4'}]}",,eu-west-1a
m7i.xlarge,,,4.0,0.2016,us-east-1,,,us-east-1a
"""
CLUSTER = {"m7i.xlarge": 0.2016, "g6e.2xlarge": 2.24208}
SHIPPED = load_prices(["conf/prices.yaml"])


def node(labels: dict[str, str] | None = None, **resources: float) -> dict:
    return {"Labels": labels or {}, "Resources": {k.replace("__", ":"): v for k, v in resources.items()}}


def on_demand(labels: dict[str, str] | None = None, **resources: float) -> NodePrice:
    return price_node(node(labels, **resources), SHIPPED, region=None, spot=False)


@pytest.fixture
def file(tmp_path: Path):
    def write(text: str, name: str = "prices.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_every_shipped_row_has_a_price_a_date_and_a_source():
    rows = yaml.safe_load((REPOSITORY / "conf" / "prices.yaml").read_text())["prices"]
    assert len(rows) == len(SHIPPED) == len({row.instance for row in SHIPPED})
    for row in SHIPPED:
        assert row.usd_per_hour
        assert row.date.startswith("2026")
        assert row.source
        assert (row.gpu and row.count >= 1) or row.instance in CLUSTER


def test_the_nodes_of_the_shipped_cluster_have_a_price_but_on_spot():
    for kind in yaml.safe_load((REPOSITORY / "ray_cluster.yaml").read_text())["available_node_types"].values():
        labels = kind["labels"]
        price = on_demand(labels, **kind["resources"])
        if labels["ray.io/market-type"] == "spot":
            assert price.usd_per_hour is None  # it changes by the hour: a row of the user's own
        else:
            assert price == NodePrice(labels["instance-type"], CLUSTER[labels["instance-type"]])


def test_a_node_is_known_by_its_instance_type_label():
    assert on_demand({"instance-type": "g6.xlarge"}, CPU=4, GPU=1) == NodePrice("g6.xlarge", 0.8048)
    assert on_demand({"node.kubernetes.io/instance-type": "p5.48xlarge"}, GPU=8).usd_per_hour == 55.04


def test_a_node_without_that_label_is_known_by_its_accelerators():
    assert on_demand(GPU=1, accelerator_type__T4=1) == NodePrice("g4dn.xlarge", 0.526)
    assert on_demand({"ray.io/accelerator-type": "H100"}, GPU=8) == NodePrice("p5.48xlarge", 55.04)


def test_a_pod_with_some_of_its_instances_gpus_costs_its_share():
    assert on_demand({"instance-type": "p5.48xlarge"}, GPU=2) == NodePrice("2/8 of p5.48xlarge", 55.04 / 4)


def test_only_a_price_of_each_gpu_is_multiplied():
    assert on_demand({"instance-type": "nebius-h100"}, GPU=8) == NodePrice("8 x nebius-h100", 8 * 2.95)
    assert on_demand({"instance-type": "nebius-h100"}, GPU=1) == NodePrice("nebius-h100", 2.95)


@pytest.mark.parametrize(
    ("labels", "resources", "problem"),
    [
        ({"instance-type": "g6.xlarge"}, {"GPU": 4}, "g6.xlarge has 1 in the price files"),
        ({}, {"CPU": 4}, "neither an instance-type label nor an accelerator type"),
        ({"instance-type": "x9.huge"}, {"GPU": 1}, "no price file knows the instance x9.huge"),
        ({}, {"GPU": 3, "accelerator_type__T4": 1}, "no price file has an instance with 3 x T4"),
        ({}, {"GPU": 8, "accelerator_type__A100": 1}, "several on-demand prices of 8 x A100"),
        ({"instance-type": "g6.xlarge", "ray.io/market-type": "spot"}, {"GPU": 1}, "no spot price of g6.xlarge"),
        ({"instance-type": "g6.xlarge", "ray.io/availability-region": "mars"}, {"GPU": 1}, "no price of g6.xlarge in"),
    ],
)
def test_what_is_not_known_for_sure_has_no_price_and_says_why(labels, resources, problem):
    found = on_demand(labels, **resources)
    assert found.usd_per_hour is None
    assert problem in found.problem


def test_a_nodes_market_and_region_come_before_the_configurations(file):
    rows = load_prices([file(CATALOG, "aws.csv")])
    here = {"instance-type": "g6.xlarge", "ray.io/availability-region": "us-east-1"}
    spot = here | {"ray.io/market-type": "spot"}
    assert price_node(node(here), rows, region="eu-west-1", spot=False).usd_per_hour == 0.8048
    assert price_node(node(spot), rows, region=None, spot=False).usd_per_hour == 0.35  # the dearest of its zones
    assert (
        price_node(node(spot | {"ray.io/market-type": "on-demand"}), rows, region=None, spot=True).name == "g6.xlarge"
    )
    unlabelled = node({"instance-type": "g6.xlarge"})
    assert "several" in price_node(unlabelled, rows, region=None, spot=False).problem
    assert price_node(unlabelled, rows, region="eu-west-1", spot=False).usd_per_hour == 0.9


def test_skypilot_catalogs_are_read_with_machines_without_gpus(file):
    rows = load_prices([file(CATALOG, "aws.csv")])
    assert rows[0] == Price("g6.xlarge", 0.8048, 0.31, "L4", 1.0, region="us-east-1", source=rows[0].source)
    assert find_instance(rows, "m7i.xlarge", region=None, spot=False).usd_per_hour == 0.2016


def test_the_first_file_that_knows_an_instance_wins(file):
    mine = file("prices: [{instance: g6.xlarge, usd_per_hour: 0.5}]")
    rows = load_prices([mine, "conf/prices.yaml"])
    assert find_instance(rows, "g6.xlarge", region=None, spot=False).usd_per_hour == 0.5
    assert find_instance(rows, "p5.48xlarge", region=None, spot=False).usd_per_hour == 55.04


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prices: [{instance: a, usd_per_hour: -1}]", "usd_per_hour of a must be a number, at least 0, got -1"),
        ("prices: [{instance: a, usd_per_hour: cheap}]", "usd_per_hour of a must be a number, at least 0, got 'cheap'"),
        ("prices: [{instance: a, usd_per_hour: .nan}]", "usd_per_hour of a must be a number, at least 0, got nan"),
        ("prices: [{instance: a}]", "a must have usd_per_hour or spot_usd_per_hour"),
        ("prices: [{usd_per_hour: 1}]", "every row must name its instance"),
        ("prices: [{instance: a, usd_per_hour: 1, per_gpu: 2}]", "per_gpu of a must be true or false, got 2"),
        ("prices: [{instance: a, usd: 1}]", "unknown key usd of a"),
        ("rows: []", "must hold a list of rows under `prices`"),
        ("- a", "must hold a list of rows under `prices`"),
        ("{", "must be a readable price file"),
    ],
)
def test_a_wrong_price_file_is_named_with_what_is_wrong(file, text, expected):
    path = file(text)
    with pytest.raises(UserError) as caught:
        load_prices([path])
    assert expected in str(caught.value)
    assert path in str(caught.value)


def test_a_wrong_catalog_and_a_missing_file_are_named(file):
    with pytest.raises(UserError, match="SkyPilot's columns, found no InstanceType"):
        load_prices([file("Name,Price\na,1\n", "a.csv")])
    with pytest.raises(UserError, match="usd_per_hour of a must be a number, at least 0, got '-2'"):
        load_prices([file("InstanceType,Price\na,-2\n", "a.csv")])
    with pytest.raises(UserError, match="price files, found none at nowhere"):
        load_prices(["nowhere.yaml"])
