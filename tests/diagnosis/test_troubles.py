import pytest
from markdown import markdown

from bnlightning.diagnosis.troubles import Troubles, table

RULE = "ActivationMonitor(warn_dead_above=0.5)"


def test_a_trouble_begins_and_ends():
    troubles = Troubles()
    assert not troubles.update(RULE, "train", 0, {}).began
    change = troubles.update(RULE, "train", 10, {"a (ReLU)": "60%"})
    assert (change.began, change.ended, change.is_told) == (True, False, True)
    # A second layer is a row of its own, but no news: there was trouble already.
    assert not troubles.update(RULE, "train", 20, {"a (ReLU)": "70%", "b (ReLU)": "80%"}).began
    assert not troubles.update(RULE, "train", 30, {"b (ReLU)": "80%"}).ended
    change = troubles.update(RULE, "train", 40, {})
    assert (change.began, change.ended, change.is_told) == (False, True, True)
    assert [(row.layer, row.what, row.since, row.until) for row in troubles.rows] == [
        ("b (ReLU)", "80%", 20, 40),
        ("a (ReLU)", "60%", 10, 30),
    ]


def test_an_evaluation_does_not_end_what_training_has():
    troubles = Troubles()
    troubles.update(RULE, "train", 10, {"a": "60%"})
    assert not troubles.update(RULE, "val", 10, {}).ended
    troubles.update(RULE, "val", 20, {"a": "60%"})
    assert not troubles.update(RULE, "train", 30, {}).ended and troubles.is_open(RULE)
    assert troubles.update(RULE, "val", 40, {}).ended and not troubles.is_open(RULE)


def test_what_comes_and_goes_is_told_three_times_and_stands_in_the_table():
    troubles, told = Troubles(), []
    for step in range(0, 100, 10):
        told += [change for ill in ({"a": "60%"}, {}) if (change := troubles.update(RULE, "train", step, ill)).is_told]
    assert len(told) == 6 and len(troubles.rows) == 10


def test_the_table_has_the_newest_first_and_says_what_has_ended():
    one, other = Troubles(), Troubles()
    one.update(RULE, "train", 10, {"net.__a__ (ReLU)": "60% of the units are dead (training, step 10)."})
    one.update(RULE, "train", 20, {})
    other.update("GradientMonitor(x=1)", "train", 30, {"b|c (Linear)": "the gradient is zero."})
    text = table([one, other], [RULE, "NaN and infinities"], [], 50)
    rows = [[cell.split("</td>")[0] for cell in row.split("<td>")[1:]] for row in _html(text).split("<tr>")[2:]]
    assert rows == [
        ["30", "b|c (Linear)", "The gradient is zero.", "<strong>goes on</strong>"],
        ["10", "net.__a__ (ReLU)", "60% of the units are dead (training, step 10).", "ended at step 20"],
    ]
    assert "As of step 50. Looked for: ActivationMonitor(warn_dead_above=0.5), NaN and infinities." in _html(text)


def _html(text):
    return markdown(text, extensions=["tables"]).replace("&#124;", "|").replace("&nbsp;", " ")


@pytest.mark.parametrize(("rules", "words"), [([RULE], "warn_dead_above=0.5"), ([], "nothing, since no limit is set")])
def test_nothing_is_said_in_words(rules, words):
    text = _html(table([Troubles()], rules, [], 200))
    assert "<strong>Nothing found</strong> up to step 200." in text and words in text


def test_what_has_no_limit_is_said_not_to_be_looked_for():
    text = _html(table([Troubles()], [], ["warn_dead_above", "warn_saturated_above"], 10))
    assert "Nothing found" not in text and "<strong>Not looked for</strong>" in text
    assert "since no limit is set: warn_dead_above, warn_saturated_above." in text


def test_of_many_rows_those_that_go_on_are_kept():
    troubles = Troubles()
    troubles.update(RULE, "train", 0, {f"ended{number}": "x" for number in range(40)} | {"on": "x"})
    troubles.update(RULE, "train", 1, {"on": "x"})
    text = table([troubles], [RULE], [], 1)
    assert text.count("ended at step 1") == 29 and "| on | X | **goes on** |" in text
    assert "11 more are left out." in text


def test_the_state_goes_through_a_checkpoint():
    troubles, loaded = Troubles(), Troubles()
    troubles.update(RULE, "train", 10, {"a": "60%", "b": "70%"})
    troubles.update(RULE, "train", 20, {"a": "60%"})
    loaded.load_state_dict(troubles.state_dict())
    assert loaded.rows == troubles.rows and loaded.step == 20
    assert not loaded.update(RULE, "train", 30, {"a": "60%"}).began
    assert loaded.update(RULE, "train", 40, {}).ended
