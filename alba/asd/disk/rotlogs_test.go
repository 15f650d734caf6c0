package disk

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"path"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"

	"scoria/alba/asd"
	"scoria/alba/asd/asdtest"
	"scoria/alba/vfs"
)

// endedLogs are the logs of an open disk that have the mark of their end.
func endedLogs(t *testing.T, fsys vfs.FS, d *Disk) (names []string) {
	t.Helper()
	for _, name := range d.durable.list() {
		number, ok := walNumber(name)
		if !ok {
			continue
		}
		size, _ := d.durable.of(name)
		b, err := readAll(fsys, name)
		must(t, err)
		if int64(len(b)) >= size && size > walHead && binary.LittleEndian.Uint32(b[size-4:size]) == number+1 {
			names = append(names, name)
		}
	}
	return names
}

// TestVerifyEndedLogs: logs that the key-value store has ended, and keeps to write them
// again, are sound: their last bytes are the mark of their end, not damage.
func TestVerifyEndedLogs(t *testing.T) {
	fsys := vfs.NewMem()
	d := open(t, fsys, "/asd", testOptions)
	defer d.Close()
	for i := range 20 {
		must(t, d.Apply(background, nil, []asd.Update{asd.Put(fmt.Sprint("key-", i), asd.NewValue(make([]byte, 300)))}, guest))
	}
	must(t, d.db.Flush())
	ended := endedLogs(t, fsys, d)
	for _, name := range ended {
		number := logNumber(t, name)
		size, _ := d.durable.of(name)
		before := d.db.Metrics().Flush.Count
		if reason, err := d.verifyLog(name, number, size); err != nil || reason != "" {
			t.Errorf("%s: %q, %v", name, reason, err)
		}
		if n := d.db.Metrics().Flush.Count; n != before {
			t.Errorf("%s: %d tables were written for a sound log", name, n-before)
		}
		must(t, fsys.Corrupt(name, size/2))
		if reason, err := d.verifyLog(name, number, size); err != nil || reason == "" {
			t.Errorf("%s: damage is not found: %v", name, err)
		}
	}
	if len(ended) == 0 {
		t.Fatal("no log that has ended is there")
	}
}

// TestRottenLogThatIsNotNeeded: damage to a log whose contents are in tables, and which
// is kept only to be written again, keeps no ASD from starting with all that it has.
func TestRottenLogThatIsNotNeeded(t *testing.T) {
	fsys, d, m := rotRig(t, false)
	defer d.Close()
	must(t, d.db.Flush())
	must(t, d.Apply(background, nil, []asd.Update{asd.RaiseEpoch("other", 1)}, guest))
	ended := endedLogs(t, fsys, d)
	killed, err := fsys.KillClone()
	must(t, err)
	for _, name := range ended {
		b, err := readAll(killed, name)
		must(t, err)
		must(t, killed.Corrupt(name, int64(len(b)/2)))
		b, err = readAll(killed, name)
		must(t, err)
		if _, _, damaged := walDamage(b, logNumber(t, name), false); !damaged {
			t.Fatalf("%s is not damaged: the test does not reach what it is for", name)
		}
	}
	if len(ended) == 0 {
		t.Fatal("no log that has ended is there")
	}
	again := open(t, killed, "/asd", testOptions)
	defer again.Close()
	if bad := unreadable(t, again, m, "after the start"); bad > 0 {
		t.Errorf("%d can't be read", bad)
	}
	res, err := asd.VerifyAll(background, again, asd.VerifyOptions{})
	if err != nil || len(res.Bad) > 0 {
		t.Errorf("Verify says %+v, %v", res.Bad, err)
	}
}

// twoLogs is an ASD that was killed when two of its logs were in no table yet: the first
// of them has ended. The values of all keys, from "key-0" on, are v.
func twoLogs(t *testing.T) (fsys *vfs.Mem, first string, keys int, v asd.Value) {
	t.Helper()
	v = asd.NewValue(asdtest.Bytes(rand.New(rand.NewPCG(1, 1)), 10_000))
	running := vfs.NewMem()
	d := open(t, running, "/asd", testOptions)
	defer d.Close()
	var full atomic.Bool
	full.Store(true)
	running.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpCreate && strings.HasSuffix(name, ".sst") && full.Load() {
			return syscall.ENOSPC
		}
		return nil
	})
	defer full.Store(false)
	newest := func() (name string) {
		for _, n := range d.durable.list() {
			if _, ok := walNumber(n); ok {
				name = n
			}
		}
		return name
	}
	put := func(n int) {
		t.Helper()
		must(t, d.Apply(background, nil, []asd.Update{asd.Put(fmt.Sprint("key-", n), v)}, guest))
	}
	for n := 0; ; n++ {
		if n == 200 {
			t.Fatal("no other log was begun")
		}
		put(n)
		if first == "" {
			first = newest()
		}
		if newest() != first {
			put(n + 1) // for certain into another one
			keys = n + 2
			break
		}
	}
	fsys, err := running.KillClone()
	must(t, err)
	return fsys, first, keys, v
}

// TestP5RottenLogThatAnotherFollows: a log that another follows has its end. Where that
// is damaged, or what comes last before it, the ASD is refused; salvage opens it with
// the records before, and with what the other log has.
func TestP5RottenLogThatAnotherFollows(t *testing.T) {
	fsys, first, keys, v := twoLogs(t)
	check := func(d *Disk, when string) (there int) {
		t.Helper()
		for i := range keys {
			got, err := d.Get(background, fmt.Sprint("key-", i), guest)
			if errors.Is(err, asd.ErrNoKey) && i > 0 && i < keys-1 {
				continue
			}
			if err != nil || !bytes.Equal(got.Data, v.Data) {
				t.Errorf("%s: key-%d: %v", when, i, err)
			}
			there++
		}
		return there
	}
	sound := fsys.CrashClone(rand.New(rand.NewPCG(1, 1)))
	d := open(t, sound, "/asd", testOptions)
	if n := check(d, "sound"); n != keys {
		t.Errorf("%d of %d keys are there", n, keys)
	}
	must(t, d.Close())

	log, err := readAll(fsys, first)
	must(t, err)
	end, _ := walEnd(log, logNumber(t, first))
	at := map[string]int64{"the mark": end + walHead - 1}
	for off := int64(0); off < end; {
		next, _, ok := walChunk(log, off, logNumber(t, first))
		if !ok { // what is left of a block
			off = (off/walBlock + 1) * walBlock
			continue
		}
		if at["the last chunk"] = next - 1; (log[off+6]-walFirstKind)%walParts == walLastPart {
			at["the second part of a record"] = next - 1
		}
		off = next
	}
	for what, off := range at {
		rotted := fsys.CrashClone(rand.New(rand.NewPCG(1, 1)))
		must(t, rotted.Corrupt(first, off))
		before := contents(t, rotted)
		_, err := Open(rotted, "/asd", testOptions)
		if !errors.Is(err, asd.ErrCorrupt) || !strings.Contains(err.Error(), "salvage") {
			t.Errorf("%s: opened: %v", what, err)
			continue
		}
		for name, b := range contents(t, rotted) {
			if was, ok := before[name]; !ok || !bytes.Equal(was, b) {
				t.Errorf("%s: the refusal changed %s", what, name)
			}
			delete(before, name)
		}
		if len(before) > 0 {
			t.Errorf("%s: the refusal removed %v", what, before)
		}
		opts := testOptions
		opts.Salvage = true
		d := open(t, rotted, "/asd", opts)
		if n := check(d, what); n < keys && what == "the mark" || n < 2 {
			t.Errorf("%s: %d of %d keys are there", what, n, keys)
		}
		must(t, d.Close())
	}
	if len(at) != 3 {
		t.Fatalf("no record of two parts: %v", at)
	}
}

// contents of all files of an ASD that have any.
func contents(t *testing.T, fsys vfs.FS) map[string][]byte {
	t.Helper()
	m := map[string][]byte{}
	for _, name := range filesBelow(t, fsys, "/asd") {
		if base := path.Base(name); strings.EqualFold(base, "lock") {
			continue // who had it
		}
		b, err := readAll(fsys, name)
		must(t, err)
		m[name] = b
	}
	return m
}
