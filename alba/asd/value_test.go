package asd

import (
	"bytes"
	"errors"
	"testing"
)

func TestValueCheckFindsEveryFlippedByte(t *testing.T) {
	for _, blockSize := range []int{512, 700, 4096} {
		data := bytes.Repeat([]byte("block of bytes "), 100)
		v := NewValueBlocks(data, blockSize)
		if err := v.Check("k"); err != nil {
			t.Fatal(err)
		}
		for i := range data {
			data[i] ^= 1
			var bad *CorruptError
			if err := v.Check("k"); !errors.As(err, &bad) || bad.Off > int64(i) || bad.Off+bad.Size <= int64(i) {
				t.Fatalf("block size %d, byte %d flipped: %v", blockSize, i, err)
			}
			data[i] ^= 1
		}
	}
}

func TestValueCheckRefusesWrongSizes(t *testing.T) {
	for name, v := range map[string]Value{
		"no block size":     {Data: []byte("x"), CRCs: []uint32{CRC([]byte("x"))}},
		"a checksum lacks":  {Data: []byte("x"), BlockSize: 512},
		"one too many":      {BlockSize: 512, CRCs: []uint32{0}},
		"blocks too large":  NewValueBlocks([]byte("x"), MaxBlockSize+1),
		"value is too long": {Data: make([]byte, MaxValueBytes+1), BlockSize: 4096},
	} {
		if err := v.Check("k"); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestSumGolden: sums are stored and asserted by later versions.
func TestSumGolden(t *testing.T) {
	long := NewValueBlocks(bytes.Repeat([]byte{1, 2, 3, 4, 5}, 40_000), 512)
	if long.Sum() != SumOf(200_000, 512, long.CRCs) {
		t.Fatal("Sum and SumOf differ")
	}
	for name, c := range map[string]struct {
		v    Value
		want uint32
	}{
		"empty": {NewValue(nil), 0x5bc2c8d7},
		"short": {NewValue([]byte("short")), 0xdc21dd95},
		"long":  {long, 0xcf299384},
	} {
		if got := c.v.Sum(); got != c.want {
			t.Errorf("%s: sum %#x, want %#x", name, got, c.want)
		}
	}
}

// TestCheckAsItComes: a value that is read in pieces is filled whole, and whichever byte
// is damaged on the way is found then or by Check.
func TestCheckAsItComes(t *testing.T) {
	for _, size := range []int{0, 1, 4096, 600_000} {
		for _, blockSize := range []int{512, 4096, 4112, MaxBlockSize} {
			data := bytes.Repeat([]byte("block of bytes! "), size/16+1)[:size]
			sent := NewValueBlocks(data, blockSize)
			for _, damaged := range []int{-1, 0, size / 2, size - 1} {
				if damaged >= size {
					continue
				}
				v := Value{Data: make([]byte, size), BlockSize: blockSize, CRCs: sent.CRCs}
				at := 0
				err := v.CheckAsItComes(func(p []byte) error {
					at += copy(p, data[at:])
					if i := damaged - (at - len(p)); damaged >= 0 && i >= 0 && i < len(p) {
						p[i] ^= 0x10
					}
					return nil
				})
				if err != nil || at != size {
					t.Fatalf("%d bytes of %d, %v", at, size, err)
				}
				if err := v.Check("k"); (err == nil) != (damaged < 0) {
					t.Errorf("size %d, blocks of %d, byte %d damaged: %v", size, blockSize, damaged, err)
				}
			}
		}
	}
	v := NewValueBlocks(make([]byte, 9000), 4096)
	gone := errors.New("gone")
	if err := v.CheckAsItComes(func([]byte) error { return gone }); !errors.Is(err, gone) {
		t.Error(err)
	}
}
