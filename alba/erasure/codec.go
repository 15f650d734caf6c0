// Package erasure turns objects into fragments and back: it compresses and
// encrypts the blocks of an object, cuts the stream that results into chunks, and
// computes parity. It is pure: bytes in, bytes out; package alba draws the layout.
package erasure

import (
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/reedsolomon"

	"scoria/alba"
)

// columnBytes is how much of each fragment is encoded at a time: k+m columns stay
// in the processor's cache, which makes it two to three times as fast as whole
// fragments of megabytes.
const columnBytes = 64 << 10

// ErrTooFew: fewer than k fragments are there.
var ErrTooFew = errors.New("too few fragments")

// Codec computes parity for one (k, m). The code is systematic: fragments 0 to k-1
// are the data. Its matrix is part of the format (golden files hold it). Safe from
// any goroutine.
type Codec struct {
	k, m int
	rs   reedsolomon.Encoder // nil for k = 1 (copies) and m = 0
}

var codecs sync.Map // [2]int → *Codec

// CodecFor returns the codec for k data and m parity fragments, within the limits
// of a preset.
func CodecFor(k, m int) (*Codec, error) {
	if k < 1 || k > alba.MaxK || m < 0 || m > alba.MaxM {
		return nil, fmt.Errorf("erasure code (%d, %d): must be 1 to %d and 0 to %d", k, m, alba.MaxK, alba.MaxM)
	}
	if c, ok := codecs.Load([2]int{k, m}); ok {
		return c.(*Codec), nil
	}
	c := &Codec{k: k, m: m}
	if k > 1 && m > 0 {
		rs, err := reedsolomon.New(k, m, reedsolomon.WithMaxGoroutines(1))
		if err != nil {
			return nil, fmt.Errorf("erasure code (%d, %d): %w", k, m, err)
		}
		c.rs = rs
	}
	got, _ := codecs.LoadOrStore([2]int{k, m}, c)
	return got.(*Codec), nil
}

// Encode fills shards[k:] from shards[:k]; all must have one length.
func (c *Codec) Encode(shards [][]byte) error {
	n, err := c.check(shards)
	if err != nil || c.m == 0 {
		return err
	}
	if c.k == 1 {
		for _, p := range shards[1:] {
			copy(p, shards[0])
		}
		return nil
	}
	columns := make([][]byte, len(shards))
	for off := 0; off < n; off += columnBytes {
		end := min(off+columnBytes, n)
		for i, s := range shards {
			columns[i] = s[off:end]
		}
		if err := c.rs.Encode(columns); err != nil {
			return fmt.Errorf("encode: %w", err)
		}
	}
	return nil
}

func (c *Codec) check(shards [][]byte) (int, error) {
	if len(shards) != c.k+c.m {
		return 0, fmt.Errorf("%d fragments, must be k+m (%d)", len(shards), c.k+c.m)
	}
	for i, s := range shards {
		if len(s) != len(shards[0]) {
			return 0, fmt.Errorf("fragment %d has %d bytes, fragment 0 has %d", i, len(s), len(shards[0]))
		}
	}
	return len(shards[0]), nil
}

// Reconstruct fills the fragments, or equal ranges of fragments, that want names.
// have says which are there, at least k of them; all of shards[i] that are there or
// wanted must have one length, the others are not looked at.
func (c *Codec) Reconstruct(shards [][]byte, have, want []bool) error {
	if len(shards) != c.k+c.m || len(have) != len(shards) || len(want) != len(shards) {
		return fmt.Errorf("%d fragments, %d have, %d want: must be k+m (%d)", len(shards), len(have), len(want), c.k+c.m)
	}
	n, count, first := -1, 0, -1
	for i, s := range shards {
		if !have[i] && !want[i] {
			continue
		}
		if n >= 0 && len(s) != n {
			return fmt.Errorf("fragment %d has %d bytes, others have %d", i, len(s), n)
		}
		n = len(s)
		if have[i] {
			count++
			if first < 0 {
				first = i
			}
		}
	}
	if count < c.k {
		return fmt.Errorf("%d of %d fragments, needed are %d: %w", count, len(shards), c.k, ErrTooFew)
	}
	if c.k == 1 {
		for i := range shards {
			if want[i] && !have[i] {
				copy(shards[i], shards[first])
			}
		}
		return nil
	}
	if c.m == 0 {
		return nil // all are there
	}
	columns := make([][]byte, len(shards))
	for off := 0; off < n; off += columnBytes {
		end := min(off+columnBytes, n)
		for i, s := range shards {
			switch {
			case have[i]:
				columns[i] = s[off:end]
			case want[i]:
				columns[i] = s[off:off:end] // empty: to be filled in place
			default:
				columns[i] = nil
			}
		}
		if err := c.rs.ReconstructSome(columns, want); err != nil {
			return fmt.Errorf("reconstruct: %w", err)
		}
	}
	return nil
}
