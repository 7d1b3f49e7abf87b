import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from pscope.experiments.probe import probe_elsewhere


def fitted(states, answers, seen, unseen):
    scaler = StandardScaler().fit(states[seen])
    probe = LogisticRegression(max_iter=200).fit(scaler.transform(states[seen]), answers[seen])
    return probe.predict(scaler.transform(states[unseen]))


def planted(seed):
    random = np.random.default_rng(seed)
    answers = random.permutation(["red", "green", "blue"] * 6)
    states = random.normal(size=(18, 3, 4)) + 0.8 * (answers[:, None, None] == "red")
    return states, answers, np.arange(18) % 3


def test_the_layer_is_chosen_on_folds_that_took_no_part():
    leaks = 0
    for seed in range(4):
        states, answers, folds = planted(seed)
        probed = probe_elsewhere(states, answers, folds, lambda unit, word, own=answers: word == own[unit])
        right = np.array([fitted_elsewhere(states[:, layer], answers, folds) == answers for layer in range(3)]).T
        np.testing.assert_array_equal(probed.right, right)
        for fold in range(3):
            one, other = (index for index in range(3) if index != fold)
            # With three folds, each of the two others is scored by a probe fitted on the second alone.
            shares = []
            for layer in range(3):
                at = states[:, layer]
                hits = [
                    fitted(at, answers, folds == seen, folds == scored) == answers[folds == scored]
                    for seen, scored in ((one, other), (other, one))
                ]
                shares.append(np.concatenate(hits).mean())
            best = [share == max(shares) for share in shares]
            assert (probed.chosen[folds == fold] == best).all()
            # Scored by probes that were fitted on the fold itself, another layer would look best.
            leaking = right[folds != fold].mean(axis=0)
            leaks += not (best & (leaking == leaking.max())).any()
    assert leaks > 0


def fitted_elsewhere(states, answers, folds):
    guesses = np.empty_like(answers)
    for fold in range(3):
        guesses[folds == fold] = fitted(states, answers, folds != fold, folds == fold)
    return guesses


def test_what_counts_is_not_the_word_but_the_answer():
    states, answers, folds = planted(0)
    # To the first unit, which is red, green counts as well.
    answers[0], answers[1:] = "red", "green"
    probed = probe_elsewhere(states, answers, folds, lambda unit, word: unit == 0 or word == answers[unit])
    assert (probed.predicted[0] == "green").all()
    assert probed.right.all()
    assert (probed.majority == "green").all()
    assert probed.majority_right.all()
    assert probed.nameable.all()
    strict = probe_elsewhere(states, answers, folds, lambda unit, word: word == answers[unit])
    assert not strict.right[0].any()
    assert strict.nameable.tolist() == [False] + [True] * 17
    assert strict.majority_right.tolist() == [False] + [True] * 17
