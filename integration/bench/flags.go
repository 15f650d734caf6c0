package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"github.com/docker/go-units"
)

// config is what the flags say.
type config struct {
	rounds    int
	seconds   time.Duration // of one measurement
	rows      *regexp.Regexp
	servers   map[string]bool
	output    string
	list      bool
	clientCPU int
	serverCPU int

	bin, dataDir, shmDir string
	burst, buffer        int64
	region               int64
	objectBytes          int64
	peerPoll             time.Duration
	poll                 time.Duration
	sustained            time.Duration
	scrub                time.Duration
	scrubVolume          int64
	idleVolumes          int
	syntheticMap         string
	scoriadArgs          []string
	store                string
}

var errUsage = errors.New("usage")

// bytesFlag is a size such as 512M.
type bytesFlag struct{ v *int64 }

func (b bytesFlag) String() string {
	if b.v == nil {
		return ""
	}
	return strings.ReplaceAll(units.CustomSize("%g%s", float64(*b.v), 1024, []string{"", "K", "M", "G", "T"}), " ", "")
}

func (b bytesFlag) Set(s string) (err error) {
	*b.v, err = units.RAMInBytes(s)
	return err
}

func parseFlags(args []string) (*config, error) {
	c := &config{burst: 2 << 30, buffer: 4 << 30, region: 256 << 20, objectBytes: 64 << 20, scrubVolume: 2 << 30}
	fs := flag.NewFlagSet("bench", flag.ContinueOnError)
	var rows, servers, extra string
	var quick bool
	fs.IntVar(&c.rounds, "rounds", 5, "alternating rounds")
	fs.DurationVar(&c.seconds, "time", time.Second, "length of one measurement")
	fs.BoolVar(&quick, "quick", false, "2 rounds of 300ms, 100 idle volumes, 4s of sustained writes and of overwriting")
	fs.StringVar(&rows, "rows", "", "regular expression: which rows (see -list)")
	fs.BoolVar(&c.list, "list", false, "print the rows' names and end")
	fs.StringVar(&servers, "servers", scoriaName+","+peerName, "which servers")
	fs.StringVar(&c.output, "o", "table", "output: table or json")
	fs.IntVar(&c.clientCPU, "client-cpu", 0, "CPU of the client")
	fs.IntVar(&c.serverCPU, "server-cpu", 1, "CPU of the server; of both in placement D")
	fs.StringVar(&c.bin, "bin", "bin", "directory of scoriad and scoria")
	fs.StringVar(&c.dataDir, "data-dir", "/var/tmp", "where to make Scoria's data directory: its disk is what flushes go to")
	fs.StringVar(&c.shmDir, "shm-dir", "/dev/shm", "a tmpfs, for the peer's disk and Scoria's run directory")
	fs.Var(bytesFlag{&c.burst}, "burst", "a measurement of writes ends after so many bytes, so that it fits into the write buffer")
	fs.Var(bytesFlag{&c.buffer}, "write-buffer", "Scoria's write buffer")
	fs.Var(bytesFlag{&c.region}, "region", "part of the disk that is read and written")
	fs.Var(bytesFlag{&c.objectBytes}, "object-size", "objects of the object store's rows, at least 1M")
	fs.DurationVar(&c.peerPoll, "peer-poll", time.Millisecond, "the longest that the peer's iothread polls, in placement A")
	fs.DurationVar(&c.poll, "poll", 100*time.Microsecond, "how long Scoria polls, in placement A")
	fs.DurationVar(&c.sustained, "sustained", 12*time.Second, "length of the sustained random write, the first half not measured")
	fs.DurationVar(&c.scrub, "scrub", 10*time.Second, "length of each of the two overwrites of the scrubber's row")
	fs.Var(bytesFlag{&c.scrubVolume}, "scrub-volume", "size of the scrubber's volume")
	fs.IntVar(&c.idleVolumes, "idle-volumes", 1000, "attached volumes of the idle rows")
	fs.StringVar(&c.syntheticMap, "synthetic-map", "", "shell command that maps 1 TiB in volume $VOLUME of the stopped daemon with configuration file $CONFIG (data directory $DATA)")
	fs.StringVar(&c.store, "store", "objects", "where Scoria keeps volumes: objects or directory")
	fs.StringVar(&extra, "scoriad-args", "", "further arguments of scoriad, separated by spaces")
	if err := fs.Parse(args); err != nil {
		return nil, errUsage
	}
	if quick {
		c.rounds, c.seconds, c.idleVolumes, c.sustained, c.scrub = 2, 300*time.Millisecond, 100, 4*time.Second, 4*time.Second
	}
	c.scoriadArgs = strings.Fields(extra)
	return c, c.check(fs, rows, servers)
}

func (c *config) check(fs *flag.FlagSet, rows, servers string) (err error) {
	if c.rows, err = regexp.Compile(rows); err != nil {
		return fmt.Errorf("-rows: %w", err)
	}
	c.servers = map[string]bool{}
	for _, s := range strings.Split(servers, ",") {
		if s != scoriaName && s != peerName {
			return fmt.Errorf("-servers %q: must be %s, %s or both with a comma", servers, scoriaName, peerName)
		}
		c.servers[s] = true
	}
	switch {
	case fs.NArg() > 0:
		return fmt.Errorf("argument %q: there are only flags", fs.Arg(0))
	case c.output != "table" && c.output != "json":
		return fmt.Errorf("-o %q: must be table or json", c.output)
	case c.objectBytes < 1<<20:
		return fmt.Errorf("-object-size %d: must be at least 1M", c.objectBytes)
	case c.rounds < 1 || c.seconds < 10*time.Millisecond:
		return fmt.Errorf("-rounds %d -time %v: must be at least 1 and 10ms", c.rounds, c.seconds)
	case c.scrub <= 0 || c.scrubVolume < 64<<20:
		return fmt.Errorf("-scrub %v -scrub-volume %v: must be positive and at least 64M", c.scrub, bytesFlag{&c.scrubVolume})
	case runtime.NumCPU() < 2:
		return errors.New("two CPUs are needed: one for the client, one for the server")
	case c.clientCPU == c.serverCPU:
		return fmt.Errorf("-client-cpu and -server-cpu are both %d: they must differ", c.clientCPU)
	}
	if c.servers[scoriaName] && !c.list {
		for _, program := range []string{"scoriad", "scoria"} {
			if _, err := os.Stat(filepath.Join(c.bin, program)); err != nil {
				return fmt.Errorf("%s is missing: run `make build`, or give -bin: %w", program, err)
			}
		}
	}
	return nil
}
