"""The subwords of MambaByte's experiment, and its drafts, against plain lists."""

import jax
import jax.numpy as jnp
import numpy as np
from numpy.testing import assert_array_equal

from experiments.sequence._mambabyte_bpe import encode, learn
from experiments.sequence._mambabyte_decode import drafter


def merged(symbols, pair, new):
    out = []
    for symbol in symbols:
        if out and (out[-1], symbol) == pair:
            out[-1] = new
        else:
            out.append(symbol)
    return out


def test_byte_pairs_by_hand():
    text = np.frombuffer(b"aaaa aaaa baa, aaaaab ab\nab" * 3, np.uint8)
    vocabulary = learn(text, 261)
    pieces = [b"aaaa", b" aaaa", b" baa", b",", b" aaaaab", b" ab", b"\n", b"ab"] * 3
    # Where the text is repeated, "ab" and "aaaa" become one word.
    pieces[7] = pieces[15] = b"abaaaa"
    del pieces[8], pieces[15]
    words = [list(piece) for piece in pieces]
    for i in range(5):
        pairs = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                pairs[pair] = pairs.get(pair, 0) + 1
        best = max(pairs, key=lambda pair: (pairs[pair], -pair[0], -pair[1]))
        assert tuple(vocabulary.merges[i]) == best
        words = [merged(word, best, 256 + i) for word in words]
    assert_array_equal(encode(vocabulary, text), sum(words, []))
    fresh = np.frombuffer(b"  aab? aaaaaaa\n\n \xe2\x80\x9cabab", np.uint8)
    symbols = encode(vocabulary, fresh)
    assert b"".join(vocabulary.words[s] for s in symbols) == fresh.tobytes()


def test_drafter_goes_on_from_the_subwords_that_were_kept():
    """Against a list of symbols: the next one depends on the hash of all before."""
    words = [bytes([i]) for i in range(4)] + [b"\0\1", b"\2\3\0", b"\1\1\1\1"]
    words += [b"\3\1", b"\0\1\2", b"\3\3\3"]
    sizes = np.array([len(word) for word in words], np.int32)
    table = np.array([[*word, 0, 0, 0, 0][:4] for word in words], np.int32)
    scores = np.random.default_rng(0).normal(size=(97, len(words))).astype(np.float32)

    def read(cache, tokens):
        def step(cache, token):
            cache = (31 * cache + token + 1) % 97
            return cache, jnp.asarray(scores)[cache]

        cache, logits = jax.lax.scan(step, cache, tokens)
        return logits, cache

    def expected(symbols, known):
        own, text = [], b""
        for _ in range(3):
            number = 0
            for symbol in symbols + own:
                number = (31 * number + symbol + 1) % 97
            rest = bytes(known)[len(text) :]
            for best in np.argsort(-scores[number]):
                if words[best].startswith(rest) or rest.startswith(words[best]):
                    break
            own.append(int(best))
            text += words[best]
        return [*text[len(known) :], *[-1] * room][:room], own

    room = 6
    start, propose = drafter(read, jnp.asarray(table), jnp.asarray(sizes), 3, room)
    propose, symbols, known = jax.jit(propose), [1, 5, 2], []
    state = start(jnp.zeros((), jnp.int32), jnp.asarray(symbols))
    news, count, rng = np.zeros(room + 1, np.int32), 0, np.random.default_rng(0)
    longest = 0
    for _ in range(60):
        drafted, state = propose(state, news, np.int32(count))
        wanted, own = expected(symbols, known)
        assert_array_equal(drafted, wanted)
        kept = int(rng.integers(0, sum(b >= 0 for b in wanted) + 1))
        certain = known + wanted[:kept]
        while own and len(words[own[0]]) <= len(certain):
            certain = certain[len(words[own[0]]) :]
            symbols = [*symbols, own.pop(0)]
        known = [*certain, int(rng.integers(0, 4))]
        longest = max(longest, len(known))
        news[: kept + 1] = [*wanted[:kept], known[-1]]
        count = kept + 1
    assert longest >= 3
