package wire

import (
	"context"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"reflect"
	"strings"
	"testing"
	"time"

	"scoria/alba/asd"
)

var update = flag.Bool("update", false, "write the golden file anew")

func value(s string, blockSize int) asd.Value { return asd.NewValueBlocks([]byte(s), blockSize) }

func requests() []Request {
	return []Request{
		{ID: 1, Op: OpGet, Keys: []string{"key"}, Deadline: 1500},
		{ID: 2, Op: OpMultiGet, Keys: []string{"a", "b"}, Priority: asd.PriorityRepair},
		{ID: 3, Op: OpReadAt, Keys: []string{"key"}, Off: 4096, Size: 8192},
		{ID: 4, Op: OpRange, Range: asd.RangeRequest{From: "a", To: "b", After: true, Limit: 7}},
		{ID: 5, Op: OpExists, Keys: []string{"a"}},
		{ID: 6, Op: OpApply,
			Asserts: []asd.Assert{asd.AssertAbsent("a"), asd.AssertValue("b", []byte("old")), asd.AssertSum("c", 9, 0xabcd), asd.AssertEpoch("ns", 4)},
			Updates: []asd.Update{asd.Put("a", value(strings.Repeat("new ", 300), 512)), asd.Delete("b"), asd.RaiseEpoch("ns", 5), asd.Put("e", value("", 4096))}},
		{ID: 7, Op: OpEpochs, After: "ns"},
		{ID: 8, Op: OpVerify, Verify: asd.VerifyRequest{Cursor: "kx", MaxBytes: 1 << 20}},
		{ID: 9, Op: OpStats},
		{ID: 10, Op: OpPing},
		{ID: 3, Op: OpCancel},
	}
}

func answers() []Answer {
	return []Answer{
		{ID: 1, Op: OpGet, Value: value("value", 4096)},
		{ID: 2, Op: OpMultiGet, Results: []asd.Result{
			{Value: value("one", 512)}, {Err: &remoteError{asd.ErrNoKey, "no b"}}, {Value: value("three", 4112)},
			{Err: &asd.CorruptError{Key: "d", Off: 4096, Size: 10, Reason: "bad"}}}},
		{ID: 3, Op: OpReadAt, Read: asd.ReadInfo{Size: 5000, BlockSize: 4096, FirstBlock: 1, CRCs: []uint32{77}}, Data: []byte("last block")},
		{ID: 4, Op: OpRange, More: true, Infos: []asd.Info{{Key: "a", Exists: true, Size: 5, BlockSize: 512, Sum: 6}}},
		{ID: 5, Op: OpExists, Infos: []asd.Info{{Key: "a"}}},
		{ID: 6, Op: OpApply},
		{ID: 7, Op: OpEpochs, Epochs: []asd.NamespaceEpoch{{Namespace: "ns", Epoch: 9}}},
		{ID: 8, Op: OpVerify, Verify: asd.VerifyResult{Next: "kz", Keys: 3, Bytes: 4, Bad: []asd.BadBlocks{{Key: "y", Off: 1, Size: 2, Reason: "bad"}}}},
		{ID: 9, Op: OpStats, Stats: asd.Stats{ID: "id", Keys: 4, Full: true, Uptime: time.Second}},
		{ID: 10, Op: OpPing},
		{ID: 11, Op: OpApply, Err: &asd.StaleEpochError{Namespace: "ns", Epoch: 1, Known: 2}},
		{ID: 12, Op: OpApply, Err: &asd.AssertError{Index: 3, Assert: asd.AssertSum("k", 4, 5), Reason: "other"}},
		{ID: 13, Op: OpGet, Err: &remoteError{asd.ErrFull, "full"}},
		{ID: 14, Op: OpGet, Err: &remoteError{nil, "something else"}},
	}
}

func join(frame []byte, data [][]byte) []byte {
	for _, d := range data {
		frame = append(frame, d...)
	}
	return frame
}

// cutUp takes a frame apart as a receiver does.
func cutUp(t testing.TB, b []byte) (h Header, body, data []byte) {
	t.Helper()
	h, err := DecodeHeader(b[:HeaderBytes])
	if err != nil {
		t.Fatal(err)
	}
	body = b[HeaderBytes : HeaderBytes+h.Body]
	if err := h.CheckBody(body); err != nil {
		t.Fatal(err)
	}
	if data = b[HeaderBytes+h.Body:]; len(data) != int(h.Data) {
		t.Fatalf("%d bytes of data, the header says %d", len(data), h.Data)
	}
	return h, body, data
}

func encodeRequest(t testing.TB, r *Request) []byte {
	t.Helper()
	frame, data, err := r.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return join(frame, data)
}

func TestRoundTrip(t *testing.T) {
	for _, want := range requests() {
		h, body, data := cutUp(t, encodeRequest(t, &want))
		got, err := DecodeRequest(&h, body, data)
		if err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
			t.Errorf("got  %+v, %v\nwant %+v", got, err, want)
		}
		for i := range got.Updates {
			if got.Updates[i].Kind == asd.KindPut && got.Updates[i].Value.Check("") != nil {
				t.Error("a value came over damaged")
			}
		}
	}
	for _, want := range answers() {
		h, body, data := cutUp(t, join(want.Encode()))
		got, err := DecodeAnswer(&h, body, data)
		if err != nil || !reflect.DeepEqual(got.Err, want.Err) {
			t.Fatalf("got %+v, %v, want %+v", got, err, want)
		}
		got.Err, want.Err = nil, nil
		for i := range want.Results {
			if !reflect.DeepEqual(got.Results[i].Err, want.Results[i].Err) {
				t.Errorf("result %d: %v, want %v", i, got.Results[i].Err, want.Results[i].Err)
			}
			got.Results[i].Err, want.Results[i].Err = nil, nil
		}
		if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
			t.Errorf("got  %+v\nwant %+v", got, want)
		}
	}
}

// TestEveryStatus: each sentinel survives, alone and wrapped.
func TestEveryStatus(t *testing.T) {
	for status, sentinel := range sentinels {
		if sentinel == nil {
			continue
		}
		for _, err := range []error{sentinel, fmt.Errorf("on disk: %w", sentinel)} {
			a := Answer{Op: OpGet, Err: err}
			h, body, data := cutUp(t, join(a.Encode()))
			got, decodeErr := DecodeAnswer(&h, body, data)
			if decodeErr != nil || h.Code != uint8(status) || !errors.Is(got.Err, sentinel) {
				t.Errorf("%v became %v (status %d), %v", err, got.Err, h.Code, decodeErr)
			}
		}
	}
	for err, want := range map[error]error{
		asd.ErrClosed: asd.ErrUnavailable,
		fmt.Errorf("%w: %w", asd.ErrUnknownOutcome, context.Canceled): asd.ErrUnknownOutcome,
		fmt.Errorf("read: %w", io.ErrUnexpectedEOF):                   io.ErrUnexpectedEOF,
	} {
		a := Answer{Op: OpGet, Err: err}
		h, body, data := cutUp(t, join(a.Encode()))
		if got, _ := DecodeAnswer(&h, body, data); !errors.Is(got.Err, want) {
			t.Errorf("%v became %v", err, got.Err)
		}
	}
}

// TestGolden: the bytes of each message are those of version 1.
func TestGolden(t *testing.T) {
	var b strings.Builder
	dump := func(what string, p []byte) { fmt.Fprintf(&b, "%s\n%s\n", what, hex.Dump(p)) }
	id := [16]byte{1, 2, 3, 15: 16}
	dump("hello", (&Hello{Lowest: 1, Highest: 2, Want: id}).Encode())
	dump("welcome", (&Welcome{Version: 1, Status: OtherASD, MaxRequests: 256, ID: id}).Encode())
	for _, r := range requests() {
		dump(fmt.Sprint("request of op ", r.Op), encodeRequest(t, &r))
	}
	for _, a := range answers() {
		if a.Op != OpStats { // JSON grows
			dump(fmt.Sprint("answer of op ", a.Op), join(a.Encode()))
		}
	}
	const file = "testdata/v1.hex"
	if *update {
		if err := os.WriteFile(file, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Fatalf("the protocol has changed; it now is\n%s", b.String())
	}
}

func TestHello(t *testing.T) {
	h := Hello{Lowest: 1, Highest: 3, Want: [16]byte{5}}
	if got, err := DecodeHello(h.Encode()); err != nil || got != h {
		t.Fatal(got, err)
	}
	w := Welcome{Version: 2, Status: TooManyConnections, MaxRequests: 9, ID: [16]byte{6}}
	if got, err := DecodeWelcome(w.Encode()); err != nil || got != w {
		t.Fatal(got, err)
	}
	for _, b := range [][]byte{nil, make([]byte, HelloBytes), h.Encode()[1:]} {
		if _, err := DecodeHello(b); !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
		if _, err := DecodeWelcome(b); !errors.Is(err, ErrProtocol) {
			t.Error(err)
		}
	}
}

// TestEveryFlippedBitOfAFrame is found, but for the data's, which the values'
// checksums find.
func TestEveryFlippedBitOfAFrame(t *testing.T) {
	for _, r := range requests() {
		frame := encodeRequest(t, &r)
		for i := range frame {
			frame[i] ^= 1 << (i % 8)
			h, err := DecodeHeader(frame[:HeaderBytes])
			if err == nil && i < HeaderBytes {
				t.Fatalf("op %d: byte %d of the header", r.Op, i)
			}
			if i >= HeaderBytes && i < HeaderBytes+int(h.Body) && h.CheckBody(frame[HeaderBytes:HeaderBytes+h.Body]) == nil {
				t.Fatalf("op %d: byte %d of the body", r.Op, i)
			}
			frame[i] ^= 1 << (i % 8)
		}
	}
}

// TestCutBodies: a body that ends early or goes on is refused.
func TestCutBodies(t *testing.T) {
	for _, r := range requests() {
		h, body, data := cutUp(t, encodeRequest(t, &r))
		for n := range body {
			if _, err := DecodeRequest(&h, body[:n], data); !errors.Is(err, ErrProtocol) {
				t.Fatalf("op %d cut at %d of %d: %v", r.Op, n, len(body), err)
			}
		}
		if _, err := DecodeRequest(&h, append(body[:len(body):len(body)], 0), data); !errors.Is(err, ErrProtocol) {
			t.Fatalf("op %d with a byte more: %v", r.Op, err)
		}
	}
}

func TestLimits(t *testing.T) {
	for _, h := range []Header{
		{Op: OpGet, Body: MaxBodyBytes + 1}, {Op: OpGet, Data: asd.MaxValueBytes + 1}, {Op: 0}, {Op: opEnd},
	} {
		if _, err := DecodeHeader(AppendHeader(nil, &h)); !errors.Is(err, ErrProtocol) {
			t.Errorf("%+v: %v", h, err)
		}
	}
	half := asd.NewValue(make([]byte, asd.MaxValueBytes/2+1))
	r := Request{Op: OpApply, Updates: []asd.Update{asd.Put("a", half), asd.Put("b", half)}}
	if _, _, err := r.Encode(); !errors.Is(err, asd.ErrInvalid) {
		t.Error(err)
	}
}

func addSeeds(f *testing.F) {
	for _, r := range requests() {
		f.Add(encodeRequest(f, &r))
	}
	for _, a := range answers() {
		f.Add(join(a.Encode()))
	}
}

// frameOf makes a frame of fuzzed bytes: the lengths are set right, the
// checksums left aside, so that the decoders of bodies are reached.
func frameOf(b []byte) (h Header, body, data []byte, ok bool) {
	if len(b) < HeaderBytes {
		return h, nil, nil, false
	}
	seal(b[:HeaderBytes])
	h, err := DecodeHeader(b[:HeaderBytes])
	if err != nil {
		return h, nil, nil, false
	}
	rest := b[HeaderBytes:]
	n := min(int(h.Body), len(rest))
	return h, rest[:n], rest[n:], true
}

func FuzzRequest(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, body, data, ok := frameOf(b)
		if !ok {
			return
		}
		r, err := DecodeRequest(&h, body, data)
		if err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Fatal(err)
			}
			return
		}
		h2, body2, data2 := cutUp(t, encodeRequest(t, &r))
		again, err := DecodeRequest(&h2, body2, data2)
		if err != nil || fmt.Sprintf("%+v", again) != fmt.Sprintf("%+v", r) {
			t.Fatalf("%+v became %+v, %v", r, again, err)
		}
	})
}

func FuzzAnswer(f *testing.F) {
	addSeeds(f)
	f.Fuzz(func(t *testing.T, b []byte) {
		h, body, data, ok := frameOf(b)
		if !ok {
			return
		}
		a, err := DecodeAnswer(&h, body, data)
		if err != nil {
			if !errors.Is(err, ErrProtocol) {
				t.Fatal(err)
			}
			return
		}
		h2, body2, data2 := cutUp(t, join(a.Encode()))
		if _, err := DecodeAnswer(&h2, body2, data2); err != nil {
			t.Fatalf("%+v can't be decoded again: %v", a, err)
		}
	})
}

func FuzzHello(f *testing.F) {
	f.Add((&Hello{Lowest: 1, Highest: 2}).Encode())
	f.Add((&Welcome{Version: 1}).Encode())
	f.Fuzz(func(t *testing.T, b []byte) {
		if h, err := DecodeHello(b); err == nil {
			if again, err := DecodeHello(h.Encode()); err != nil || again != h {
				t.Fatal(h, again, err)
			}
		}
		if w, err := DecodeWelcome(b); err == nil {
			if again, err := DecodeWelcome(w.Encode()); err != nil || again != w {
				t.Fatal(w, again, err)
			}
		}
	})
}
