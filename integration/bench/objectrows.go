package main

import (
	"bytes"
	"context"
	"fmt"
	"runtime/debug"
	"time"

	"scoria/alba"
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
