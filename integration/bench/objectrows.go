package main

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"golang.org/x/sys/unix"

	"scoria/alba"
	"scoria/alba/proxy"
)

// Rows of the object store. Everything of it runs in this process, on both CPUs: what is
// compared is the store with its bounds, not with the peer.
const (
	rowObjects    = "objects"
	erasureName   = "erasure" // erasure coding alone, one CPU
	bareName      = "bare"    // a disk read alone, behind a round trip for TCP
	netName       = "net"     // an upload's erasure coding, network and disks, without a store
	objectDevices = 6
	readObjects   = 4
)

// uploadCase is one row of uploads.
type uploadCase struct {
	k, m int
	tcp  bool
}

func uploadCases() []uploadCase {
	return []uploadCase{{1, 0, false}, {4, 2, false}, {16, 4, false}, {1, 0, true}, {4, 2, true}}
}

func (c uploadCase) row() string {
	return fmt.Sprintf("objects-upload-%d+%d%s", c.k, c.m, suffix(c.tcp))
}

func (c uploadCase) policy() alba.Policy { return alba.Policy{K: c.k, M: c.m, C: c.k + c.m, X: 1} }

func suffix(tcp bool) string {
	if tcp {
		return "-tcp"
	}
	return ""
}

// readCase is one row of reads.
type readCase struct {
	tcp  bool
	cold bool // nothing of the fragments is in memory, not even their checksums
}

func readCases() []readCase {
	return []readCase{{}, {tcp: true}, {cold: true}, {tcp: true, cold: true}}
}

func (c readCase) row() string {
	if c.cold {
		return "objects-read-4k-cold" + suffix(c.tcp)
	}
	return "objects-read-4k" + suffix(c.tcp)
}

func (c readCase) target() target {
	t := target{title: "4 KiB read of a stored object, embedded, p50, against a disk read", workload: c.row(), unit: "µs", value: p50, against: bareName, limit: 2, goal: 1.3, atMost: true}
	if c.tcp {
		t.title = "4 KiB read of a stored object, loopback TCP, p50, against round trip + disk read"
	}
	if c.cold {
		t.title += ", checksums not in memory"
	}
	return t
}

// objectRows are the names under which results are kept.
func objectRows() (names []string) {
	for _, c := range uploadCases() {
		names = append(names, c.row())
	}
	for _, c := range readCases() {
		names = append(names, c.row())
	}
	return names
}

// objectTargets are the lines of §13 on the object store.
func objectTargets() (list []target) {
	for _, c := range uploadCases() {
		t := target{title: fmt.Sprintf("SCO upload, %d+%d, against its disks", c.k, c.m), workload: c.row(), unit: "MB/s", value: mbps, against: diskName, limit: 0.8}
		if c.tcp {
			// What the disks do when nothing else uses the CPUs bounds nothing here.
			disks := t
			t.title, t.against = fmt.Sprintf("SCO upload, %d+%d, loopback TCP, against coding, network and disks together", c.k, c.m), netName
			disks.title, disks.limit = "the same, against its disks alone", 0
			list = append(list, t, disks)
		} else {
			list = append(list, t)
		}
		if c.m > 0 {
			list = append(list, target{title: "the same, against erasure coding alone", workload: c.row(), unit: "MB/s", value: mbps, against: erasureName})
		}
	}
	for _, c := range readCases() {
		list = append(list, c.target())
	}
	return list
}

func over(tcp bool) string {
	if tcp {
		return ", loopback TCP"
	}
	return ""
}

func (b *bench) wantsObjects() bool {
	for _, name := range append(objectRows(), rowObjects+"-encrypted", rowObjects+"-degraded", rowObjects+"-repair") {
		if b.wants(name) {
			return true
		}
	}
	return false
}

// measureObjects goes through the rows of the object store.
func (b *bench) measureObjects(ctx context.Context) error {
	undo, err := b.allCPUs()
	if err != nil {
		return err
	}
	defer undo()
	// Without collection the memory of thousands of requests would stay.
	defer debug.SetGCPercent(debug.SetGCPercent(100))
	data := make([]byte, b.cfg.objectBytes)
	fill(data)
	for _, c := range uploadCases() {
		if b.wants(c.row()) && ctx.Err() == nil {
			b.fail(c.row(), b.measureUpload(ctx, c, data))
		}
	}
	for _, c := range readCases() {
		if b.wants(c.row()) && ctx.Err() == nil {
			b.fail(c.row(), b.measureObjectReads(ctx, c, data))
		}
	}
	for _, row := range []struct {
		name string
		do   func(context.Context, []byte) error
	}{{rowObjects + "-encrypted", b.measureEncryptedReads}, {rowObjects + "-degraded", b.measureDegraded}, {rowObjects + "-repair", b.measureRepair}} {
		if b.wants(row.name) && ctx.Err() == nil {
			b.fail(row.name, row.do(ctx, data))
		}
	}
	return nil
}

// measureUpload stores objects for a while, in turns with the same bytes written and
// synced to files, with parity computed in memory, and over TCP with all of that and the
// network together (boundNet).
func (b *bench) measureUpload(ctx context.Context, c uploadCase, data []byte) error {
	r, err := b.newObjectRig(ctx, rigOptions{devices: c.k + c.m, policy: c.policy(), tcp: c.tcp})
	if err != nil {
		return err
	}
	defer r.close()
	files := b.diskFiles(r.dir, c, data)
	var net *boundNet
	if c.tcp {
		if net, err = newBoundNet(files); err != nil {
			return err
		}
		defer net.close()
	}
	for round := range b.cfg.rounds {
		b.say("%s: round %d of %d", c.row(), round+1, b.cfg.rounds)
		n := 0
		mine, err := b.timed(ctx, len(data), func() error {
			n++
			return r.proxy.Put(ctx, "n", fmt.Sprint("o", round, "-", n), 1, bytes.NewReader(data), int64(len(data)))
		}, func() error {
			if err := r.proxy.Delete(ctx, "n", fmt.Sprint("o", round, "-", n), 1); err != nil {
				return err
			}
			return r.settle(ctx)
		})
		if err != nil {
			return err
		}
		b.results.put(c.row(), scoriaName, round, mine)
		tidy := func() error {
			if err := files.remove(); err != nil {
				return err
			}
			return r.settle(ctx)
		}
		disks, err := b.timed(ctx, len(data), files.write, tidy)
		if err != nil {
			return err
		}
		b.results.put(c.row(), diskName, round, disks)
		if net != nil {
			sent, err := b.timed(ctx, len(data), net.upload, tidy)
			if err != nil {
				return err
			}
			b.results.put(c.row(), netName, round, sent)
		}
		if c.m == 0 {
			continue
		}
		coding, err := b.timedEncoding(ctx, c, data)
		if err != nil {
			return err
		}
		b.results.put(c.row(), erasureName, round, coding)
	}
	return nil
}

// minCalls: of fewer, a single slow one would decide over a round.
const minCalls = 12

// timed calls do again and again for a measurement's length, at least minCalls times after one
// call to warm up, and counts only the time in it. after follows each call.
func (b *bench) timed(ctx context.Context, size int, do, after func() error) (res sample, err error) {
	var spent time.Duration
	for i := 0; i <= minCalls || spent < b.cfg.seconds; i++ {
		start := time.Now()
		err := do()
		took := time.Since(start)
		if after != nil && err == nil {
			err = after()
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return res, err
		}
		if i > 0 {
			spent += took
			res.Latency.Record(uint64(took))
			res.Ops++
		}
	}
	finish(&res, time.Now().Add(-spent), uint64(size))
	return res, nil
}

// storedObjects puts objects to read from.
func storedObjects(ctx context.Context, r *objectRig, data []byte) error {
	for i := range readObjects {
		if err := r.proxy.Put(ctx, "n", fmt.Sprint("o", i), 1, bytes.NewReader(data), int64(len(data))); err != nil {
			return err
		}
	}
	return nil
}

// readLoop reads 4 KiB at random places for a measurement's length.
func (b *bench) readLoop(ctx context.Context, seed uint64, size int, read func(object int, p []byte, off int64) error) (res sample, err error) {
	rng := rand.New(rand.NewPCG(seed, 7))
	p, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
	if err != nil {
		return res, fmt.Errorf("mmap: %w", err)
	}
	defer unix.Munmap(p)
	begin := time.Now()
	for res.Ops < 8 || time.Since(begin) < b.cfg.seconds {
		start := time.Now()
		if err := read(rng.IntN(readObjects), p, rng.Int64N(int64(size/4096))*4096); err != nil {
			return res, err
		}
		res.Latency.Record(uint64(time.Since(start)))
		res.Ops++
		if err := ctx.Err(); err != nil {
			return res, err
		}
	}
	finish(&res, begin, 4096)
	return res, nil
}

func (r *objectRig) readObject(ctx context.Context) func(int, []byte, int64) error {
	return func(object int, p []byte, off int64) error {
		return r.proxy.ReadAt(ctx, "n", fmt.Sprint("o", object), p, off)
	}
}

// measureObjectReads reads what no cache has, in turns with a bare loop.
func (b *bench) measureObjectReads(ctx context.Context, c readCase, data []byte) error {
	handles := 0
	if c.cold {
		handles = 1 // of open files with their checksums, per storage daemon
	}
	r, err := b.newObjectRig(ctx, rigOptions{devices: objectDevices, policy: alba.Policy{K: 4, M: 2, C: 6, X: 1}, tcp: c.tcp, handles: handles})
	if err != nil {
		return err
	}
	defer r.close()
	if err := storedObjects(ctx, r, data); err != nil {
		return err
	}
	bare, done, err := b.bareReads(r.dir, c.tcp, data)
	if err != nil {
		return err
	}
	defer done()
	b.say("%s: %d rounds", c.row(), b.cfg.rounds)
	if _, err := b.readLoop(ctx, 99, len(data), r.readObject(ctx)); err != nil { // heads are read once
		return err
	}
	counters := r.proxy.Counters()
	fromDisk, err := r.diskBytes(ctx)
	if err != nil {
		return err
	}
	fetched, asked, others := counters.FetchedBytes.Load(), counters.ReadBytes.Load(), askedOthers(counters)
	for round := range b.cfg.rounds {
		if err := r.dropCaches(); err != nil {
			return err
		}
		mine, err := b.readLoop(ctx, uint64(round), len(data), r.readObject(ctx))
		if err != nil {
			return err
		}
		b.results.put(c.row(), scoriaName, round, mine)
		other, err := b.readLoop(ctx, uint64(round), len(data), bare)
		if err != nil {
			return err
		}
		b.results.put(c.row(), bareName, round, other)
	}
	now, err := r.diskBytes(ctx)
	if err != nil {
		return err
	}
	total := float64(counters.ReadBytes.Load() - asked)
	if c.cold {
		b.figure(c.row(), "bytes that these read from their disks per byte asked, checksums not in memory"+over(c.tcp), float64(now-fromDisk)/total, "×", 0)
		return nil
	}
	b.figure(c.row(), "bytes fetched from storage daemons per byte asked"+over(c.tcp), float64(counters.FetchedBytes.Load()-fetched)/total, "×", 1.01)
	b.figure(c.row(), "bytes that these read from their disks per byte asked"+over(c.tcp), float64(now-fromDisk)/total, "×", 1.01)
	b.figure(c.row(), titleOthers, float64(askedOthers(counters)-others)/(total/4096), "×", 0)
	return nil
}

// titleOthers is of reads that more was fetched for than they asked, since a storage
// daemon was late or failed.
const titleOthers = "of these reads, asked of other storage daemons too"

func askedOthers(c *proxy.Counters) uint64 { return c.Hedged.Load() + c.Decoded.Load() }

// bareReads returns a function that reads 4 KiB directly from a file, behind a round
// trip if asked.
func (b *bench) bareReads(dir string, tcp bool, data []byte) (read func(int, []byte, int64) error, done func(), err error) {
	name := filepath.Join(dir, "bare")
	for range readObjects {
		f, err := os.OpenFile(name, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, nil, err
		}
		_, err = f.Write(data)
		if serr := f.Sync(); err == nil {
			err = serr
		}
		f.Close()
		if err != nil {
			return nil, nil, err
		}
	}
	f, err := os.OpenFile(name, os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil { // tmpfs, for one, has no direct I/O
		if f, err = os.Open(name); err != nil {
			return nil, nil, err
		}
	}
	if !tcp {
		return func(object int, p []byte, off int64) error {
			_, err := f.ReadAt(p, int64(object)*int64(len(data))+off)
			return err
		}, func() { f.Close() }, nil
	}
	ln, err := bareServer(f)
	if err != nil {
		f.Close()
		return nil, nil, err
	}
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		ln.Close()
		f.Close()
		return nil, nil, err
	}
	return func(object int, p []byte, off int64) error {
		var q [64]byte
		at := uint64(object)*uint64(len(data)) + uint64(off)
		for i := range 8 {
			q[i] = byte(at >> (8 * i))
		}
		if _, err := c.Write(q[:]); err != nil {
			return err
		}
		return readFull(c, p)
	}, func() { c.Close(); ln.Close(); f.Close() }, nil
}

// measureEncryptedReads says what encryption adds to what is read.
func (b *bench) measureEncryptedReads(ctx context.Context, data []byte) error {
	r, err := b.newObjectRig(ctx, rigOptions{devices: objectDevices, policy: alba.Policy{K: 4, M: 2, C: 6, X: 1}, encryption: alba.EncryptAES256GCM})
	if err != nil {
		return err
	}
	defer r.close()
	if err := storedObjects(ctx, r, data); err != nil {
		return err
	}
	b.say("objects-encrypted: reads")
	if _, err := b.readLoop(ctx, 99, len(data), r.readObject(ctx)); err != nil {
		return err
	}
	counters := r.proxy.Counters()
	before, err := r.diskBytes(ctx)
	if err != nil {
		return err
	}
	fetched, asked, others := counters.FetchedBytes.Load(), counters.ReadBytes.Load(), askedOthers(counters)
	if _, err := b.readLoop(ctx, 1, len(data), r.readObject(ctx)); err != nil {
		return err
	}
	after, err := r.diskBytes(ctx)
	if err != nil {
		return err
	}
	total := float64(counters.ReadBytes.Load() - asked)
	b.figure(rowObjects+"-encrypted", "with encryption: bytes fetched per byte asked", float64(counters.FetchedBytes.Load()-fetched)/total, "×", 1.1)
	b.figure(rowObjects+"-encrypted", "with encryption: bytes read from disks per byte asked", float64(after-before)/total, "×", 1.1)
	b.figure(rowObjects+"-encrypted", titleOthers, float64(askedOthers(counters)-others)/(total/4096), "×", 0)
	return nil
}

// slowDisk is how late a slow device answers.
const slowDisk = 200 * time.Millisecond

// measureDegraded reads with all devices, with one that answers late, and without it.
func (b *bench) measureDegraded(ctx context.Context, data []byte) error {
	r, err := b.newObjectRig(ctx, rigOptions{devices: objectDevices, policy: alba.Policy{K: 4, M: 2, C: 6, X: 1}})
	if err != nil {
		return err
	}
	defer r.close()
	if err := storedObjects(ctx, r, data); err != nil {
		return err
	}
	b.say("objects-degraded: reads with a device slow, and missing")
	bad, _ := r.device(0)
	for _, state := range []struct {
		title string
		set   func()
	}{
		{"all devices", func() {}},
		{fmt.Sprintf("one of 6 devices %v late", slowDisk), func() { bad.delay.Store(int64(slowDisk)) }},
		{"one of 6 devices missing", func() { bad.delay.Store(0); bad.down.Store(true) }},
	} {
		state.set()
		if err := r.dropCaches(); err != nil {
			return err
		}
		counters := r.proxy.Counters()
		fetched, asked := counters.FetchedBytes.Load(), counters.ReadBytes.Load()
		res, err := b.readLoop(ctx, 5, len(data), r.readObject(ctx))
		if err != nil {
			return err
		}
		row := rowObjects + "-degraded"
		b.figure(row, "4 KiB read, 4+2, "+state.title+", p50", p50(&res), "µs", 0)
		b.figure(row, "the same, p99", float64(res.P99)/1e3, "µs", 0)
		b.figure(row, "the same, p99.9", p999(&res), "µs", 0)
		b.figure(row, "the same, bytes fetched per byte asked", float64(counters.FetchedBytes.Load()-fetched)/float64(counters.ReadBytes.Load()-asked), "×", 0)
	}
	return nil
}

// measureRepair removes a device and rebuilds what it held on a spare one.
func (b *bench) measureRepair(ctx context.Context, data []byte) error {
	pol := alba.Policy{K: 4, M: 2, C: 6, X: 1}
	r, err := b.newObjectRig(ctx, rigOptions{devices: objectDevices + 1, policy: pol})
	if err != nil {
		return err
	}
	defer r.close()
	if err := storedObjects(ctx, r, data); err != nil {
		return err
	}
	b.say("objects-repair")
	gone, id, err := r.holder(ctx)
	if err != nil {
		return err
	}
	gone.down.Store(true)
	var before int64
	for _, c := range r.clients {
		before += c.bytes.Load()
	}
	start := time.Now()
	report, err := r.repairOne(ctx, id)
	if err != nil {
		return err
	}
	took := time.Since(start)
	read := -before
	for _, c := range r.clients {
		read += c.bytes.Load()
	}
	row := rowObjects + "-repair"
	b.figure(row, "repair of a lost device, 4+2: bytes read per byte rebuilt", float64(read)/float64(report.Bytes), "×", float64(pol.K))
	b.figure(row, "the same, bytes rebuilt", float64(report.Bytes)/took.Seconds()/1e6, "MB/s", 0)
	return nil
}

// holder finds a device that holds something.
func (r *objectRig) holder(ctx context.Context) (*benchClient, string, error) {
	for i := range r.proxy.Fleet().Members() {
		c, id := r.device(i)
		st, err := c.disk.Stats(ctx)
		if err != nil {
			return nil, "", err
		}
		if st.Bytes > 1<<20 {
			return c, id, nil
		}
	}
	return nil, "", fmt.Errorf("no device holds anything")
}
