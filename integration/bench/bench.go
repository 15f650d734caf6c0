package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"scoria/vhost/client"
	"scoria/vhost/client/load"
)

// bench is one run of the program.
type bench struct {
	cfg      *config
	dataDir  string // scratch, on the disk
	shmDir   string // scratch, on tmpfs
	results  results
	figures  []figure // rows that are no ratios of workloads
	shmLines []shmLine
	problems []problem // rows that could not be measured
	started  time.Time
	turn     *os.File // locked while this benchmark runs
	load     string   // of the machine before the begin
}

// results are measurements by workload and server, one per round; nil where a
// round failed.
type results map[string]map[string][]*sample

// A sample is one measurement.
type sample struct {
	load.Result
	// cpuAll is the server's CPU time from the begin of the load until the server
	// was quiet again, in seconds per million operations: what it puts off counts.
	cpuAll float64
	shares // tail rows: who had the server's CPU
}

func (r results) put(workload, server string, round int, res sample) {
	if r[workload] == nil {
		r[workload] = map[string][]*sample{}
	}
	list := r[workload][server]
	for len(list) <= round {
		list = append(list, nil)
	}
	list[round] = &res
	r[workload][server] = list
}

// problem is why a row has no figure.
type problem struct {
	Row   string `json:"row"`
	Error string `json:"error"`
}

func (b *bench) fail(row string, err error) {
	if err == nil || errors.Is(err, context.Canceled) {
		return
	}
	fmt.Fprintf(os.Stderr, "%s: %v\n", row, err)
	b.problems = append(b.problems, problem{Row: row, Error: err.Error()})
}

func (b *bench) wants(row string) bool { return b.cfg.rows.MatchString(row) }

// say tells the user what goes on.
func (b *bench) say(format string, args ...any) {
	fmt.Fprintf(os.Stderr, "[%3.0fs] %s\n", time.Since(b.started).Seconds(), fmt.Sprintf(format, args...))
}

func (b *bench) prepare(ctx context.Context) (err error) {
	b.started = time.Now()
	if b.cfg.list {
		return nil
	}
	if err := b.takeTurn(ctx); err != nil {
		return err
	}
	if b.load, err = loadAverage(); err != nil {
		return err
	}
	b.say("load average of the last minute: %s", b.load)
	if b.dataDir, err = os.MkdirTemp(b.cfg.dataDir, "scoria-bench-"); err != nil {
		return fmt.Errorf("-data-dir: %w", err)
	}
	if b.shmDir, err = os.MkdirTemp(b.cfg.shmDir, "scoria-bench-"); err != nil {
		return fmt.Errorf("-shm-dir: %w", err)
	}
	return nil
}

// takeTurn waits until no other benchmark runs on this machine: two would
// measure each other. The lock ends with the process.
func (b *bench) takeTurn(ctx context.Context) (err error) {
	name := filepath.Join(b.cfg.shmDir, "scoria-bench.lock")
	if b.turn, err = os.OpenFile(name, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return fmt.Errorf("-shm-dir: %w", err)
	}
	for told := false; ; told = true {
		err := unix.Flock(int(b.turn.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EWOULDBLOCK):
			return fmt.Errorf("lock %s: %w", name, err)
		case !told:
			b.say("another benchmark holds %s; waiting for it", name)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Second):
		}
	}
}

func (b *bench) cleanup() {
	for _, dir := range []string{b.dataDir, b.shmDir} {
		if dir != "" {
			os.RemoveAll(dir)
		}
	}
	if b.turn != nil {
		b.turn.Close()
	}
}

// measure runs all rows that are wanted.
func (b *bench) measure(ctx context.Context) {
	if b.cfg.list {
		return
	}
	for _, placement := range []string{placementA, placementD} {
		if b.wantsPlacement(placement) {
			b.fail("placement "+placement, b.measurePlacement(ctx, placement))
		}
	}
	b.tailFigures()
	if !b.cfg.servers[scoriaName] {
		return
	}
	if b.wantsShm() && ctx.Err() == nil {
		b.fail(shmName, b.measureShm(ctx))
	}
	if b.wantsObjects() && ctx.Err() == nil {
		b.fail(rowObjects, b.measureObjects(ctx))
	}
	if (b.wants(rowSnapWrite) || b.wants(rowCloneWrite)) && ctx.Err() == nil {
		b.fail("first writes", b.measureFirstWrites(ctx))
	}
	for _, row := range []struct {
		name string
		do   func(context.Context) error
	}{
		{rowSnapshot, b.measureSnapshot}, {rowChain, b.measureChain}, {rowCopy, b.measureCopy}, {rowSustained, b.measureSustained}, {rowScrub, b.measureScrub}, {rowNeighbour, b.measureNeighbour}, {rowIdle, b.measureIdle}, {rowRestart, b.measureRestart}, {rowRestartTiB, b.measureRestartTiB},
	} {
		if b.wants(row.name) && ctx.Err() == nil {
			b.fail(row.name, row.do(ctx))
		}
	}
}

func (b *bench) wantsPlacement(placement string) bool {
	for _, w := range workloads() {
		if w.placement == placement && b.wants(w.name) {
			return true
		}
	}
	return placement == placementA && (b.wants(rowTailRead) || b.wants(rowTailWrite))
}

// volumeBytes is the size of the disk that is measured.
func (b *bench) volumeBytes() uint64 { return max(1<<30, uint64(b.cfg.region)) }

// measurePlacement starts the servers, fills the region and goes through the
// rounds.
func (b *bench) measurePlacement(ctx context.Context, placement string) error {
	b.say("placement %s: starting %v", placement, b.serverNames())
	servers, err := b.startServers(ctx, placement)
	defer func() {
		for _, s := range servers {
			s.close()
		}
	}()
	if err != nil {
		return err
	}
	for _, s := range servers {
		if err := s.connect(client.Options{QueueSize: 256, MemoryBytes: 32 << 20}); err != nil {
			return err
		}
		if err := load.Fill(ctx, s.client, 0, uint64(b.cfg.region)); err != nil {
			return fmt.Errorf("%s: fill: %w", s.name, err)
		}
		if err := s.proc.settle(ctx, settleLimit); err != nil {
			return err
		}
	}
	for round := range b.cfg.rounds {
		b.say("placement %s: round %d of %d", placement, round+1, b.cfg.rounds)
		if err := b.round(ctx, placement, round, servers); err != nil {
			return err
		}
	}
	return nil
}

func (b *bench) serverNames() (names []string) {
	for _, n := range []string{scoriaName, peerName} {
		if b.cfg.servers[n] {
			names = append(names, n)
		}
	}
	return names
}

func (b *bench) startServers(ctx context.Context, placement string) (servers []*server, err error) {
	peerPoll, poll := b.cfg.peerPoll, b.cfg.poll
	if placement == placementD {
		peerPoll, poll = 0, 0
	}
	if b.cfg.servers[scoriaName] {
		d, err := b.newScoriad(placement, poll, b.cfg.buffer)
		if err != nil {
			return nil, err
		}
		s, err := d.startVolume(ctx, b.volumeBytes(), b.cfg.serverCPU)
		if err != nil {
			return nil, err
		}
		servers = append(servers, s)
	}
	if b.cfg.servers[peerName] {
		s, err := startPeer(ctx, b.shmDir, b.volumeBytes(), b.cfg.serverCPU, int(peerPoll))
		if err != nil {
			return servers, err
		}
		servers = append(servers, s)
	}
	return servers, nil
}

// round runs every workload once on every server. The order of the servers
// changes from round to round.
func (b *bench) round(ctx context.Context, placement string, round int, servers []*server) error {
	order := append([]*server(nil), servers...)
	if round%2 == 1 {
		for i, j := 0, len(order)-1; i < j; i, j = i+1, j-1 {
			order[i], order[j] = order[j], order[i]
		}
	}
	for _, w := range workloads() {
		if w.placement != placement || !b.wantsForTail(w.name) && !b.wants(w.name) {
			continue
		}
		for _, s := range order {
			if w.scoria && s.name != scoriaName {
				continue
			}
			if err := b.one(ctx, w, round, s); err != nil {
				return err
			}
		}
		if w.name == rowFlush1 && b.cfg.servers[scoriaName] {
			if err := b.measureDiskSync(ctx, round); err != nil {
				return err
			}
		}
	}
	if placement == placementA {
		return b.tails(ctx, round, servers)
	}
	return nil
}

// wantsForTail: the tail rows need the rate of these.
func (b *bench) wantsForTail(name string) bool {
	return name == "A-write-d32" && b.wants(rowTailWrite) || name == "A-read-d32" && b.wants(rowTailRead)
}

// one measures a workload on a server.
func (b *bench) one(ctx context.Context, w workload, round int, s *server) error {
	spec := w.spec
	spec.RegionBytes = uint64(b.cfg.region)
	spec.Duration, spec.Warmup = b.cfg.seconds, b.cfg.seconds/10
	spec.Seed = uint64(round) + 1
	spec.ServerPID = s.proc.pid()
	b.place(&spec, w.placement)
	if spec.ReadPercent < 100 {
		block := uint64(max(spec.BlockBytes, 4096))
		spec.MaxOps = max(1, uint64(b.cfg.burst)/block*100/uint64(100-spec.ReadPercent))
	}
	res, err := s.measure(ctx, spec)
	if err != nil {
		return fmt.Errorf("%s on %s: %w", w.name, s.name, err)
	}
	b.results.put(w.name, s.name, round, res)
	return nil
}

// place has the client run where its placement says, and poll or sleep accordingly. A
// client that slept on another CPU than the server's would measure how fast the machine
// wakes it.
func (b *bench) place(spec *load.Spec, placement string) {
	spec.CPUs, spec.Poll = []int{b.cfg.serverCPU}, false
	if placement == placementA {
		spec.CPUs, spec.Poll = []int{b.cfg.clientCPU}, true
	}
}

// measure puts a load on the server and waits until that is quiet again.
func (s *server) measure(ctx context.Context, spec load.Spec) (res sample, err error) {
	before, err := load.ReadUsage(s.proc.pid())
	if err != nil {
		return res, err
	}
	if res.Result, err = load.Run(ctx, s.client, spec); err != nil {
		return res, err
	}
	if err := s.proc.settle(ctx, settleLimit); err != nil {
		return res, err
	}
	after, err := load.ReadUsage(s.proc.pid())
	if res.AllOps > 0 {
		res.cpuAll = (after.CPU - before.CPU).Seconds() / float64(res.AllOps) * 1e6
	}
	return res, err
}

// newScoriad prepares a daemon with fresh directories.
func (b *bench) newScoriad(name string, poll time.Duration, buffer int64) (*scoriad, error) {
	d := &scoriad{
		bin: b.cfg.bin, args: b.cfg.scoriadArgs,
		data: filepath.Join(b.dataDir, name), run: filepath.Join(b.shmDir, name),
		config: filepath.Join(b.shmDir, name+".toml"),
	}
	for _, dir := range []string{d.data, d.run} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
	}
	text := fmt.Sprintf("data_dir = %q\nrun_dir = %q\n[write_buffer]\nsize = \"%d\"\n[vhost]\nworkers = 1\npoll = %q\n[pool]\nstore = %q\n",
		d.data, d.run, buffer, poll, b.cfg.store)
	if err := os.WriteFile(d.config, []byte(text), 0o644); err != nil {
		return nil, err
	}
	return d, nil
}
