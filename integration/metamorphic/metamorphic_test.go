package metamorphic

import (
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rs/zerolog"

	"scoria/driver/block"
)

var (
	seedFlag   = flag.Uint64("seed", 0, "run this seed only")
	opsFlag    = flag.Int("ops", 0, "operations of each run; 0: as many as CI does")
	soakFlag   = flag.Duration("soak", 0, "how long TestSoak tries one seed after the other")
	replayFlag = flag.String("replay", "", "file with a trace for TestReplay")
)

func TestMain(m *testing.M) {
	flag.DurationVar(&patience, "patience", patience, "how long a single thing may take")
	flag.Parse()
	os.Exit(m.Run())
}

// What CI does.
const (
	runs   = 10
	opsRun = 1050
)

func testLog(t *testing.T) zerolog.Logger {
	if os.Getenv("SCORIA_TEST_LOG") != "" {
		return zerolog.New(zerolog.NewTestWriter(t)).With().Timestamp().Logger()
	}
	return zerolog.Nop()
}

// recorder writes operations down before they are done, as the process may die of one.
type recorder struct {
	trace trace
	file  *os.File
}

func newRecorder(t *testing.T, dir string, s settings, seed uint64) *recorder {
	t.Helper()
	f, err := os.CreateTemp(dir, fmt.Sprintf("scoria-metamorphic-%d-*.trace", seed))
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(f, s)
	return &recorder{trace: trace{settings: s}, file: f}
}

func (r *recorder) add(o op) {
	r.trace.ops = append(r.trace.ops, o)
	fmt.Fprintln(r.file, o)
}

// close forgets the file of what went well.
func (r *recorder) close(keep bool) {
	r.file.Close()
	if !keep {
		os.Remove(r.file.Name())
	}
}

// source is where random operations come from.
type source struct {
	dir      string         // for the file with them; empty: that for temporary files
	weights  map[string]int // how often each kind of operations is picked; nil: as kinds has it
	settings *settings      // nil: random ones
	wrap     func(block.Device) block.Device
}

// generate runs n random operations and returns them, and what went wrong. They are
// written to a file, which stays if they fail.
func generate(t *testing.T, from source, seed uint64, n int) (*trace, error) {
	t.Helper()
	rng := rand.New(rand.NewPCG(seed, 1))
	s := from.settings
	if s == nil {
		random := randomSettings(rng)
		s = &random
	}
	rec := newRecorder(t, from.dir, *s, seed)
	t.Logf("-seed %d -ops %d: %s; trace in %s", seed, n, rec.trace.settings, rec.file.Name())
	r, err := newRun(rec.trace.settings, testLog(t), from.wrap)
	if err != nil {
		rec.close(true)
		return &rec.trace, err
	}
	began := time.Now()
	g := newGenerator(r, rng, from.weights)
	for range n {
		o := g.op()
		rec.add(o)
		if err = r.do(o); err != nil {
			r.leave()
			err = fmt.Errorf("operation %d, %s: %w", len(rec.trace.ops), o, err)
			break
		}
	}
	if err == nil {
		err = r.end()
	}
	t.Logf("%d operations, %d restarts, %v", len(rec.trace.ops), r.restarts, time.Since(began).Round(time.Millisecond))
	rec.close(err != nil)
	return &rec.trace, err
}

// try runs a seed and fails with the shrunk trace.
func try(t *testing.T, seed uint64, n int) {
	t.Helper()
	failed, err := generate(t, source{}, seed, n)
	if err == nil {
		return
	}
	t.Errorf("seed %d: %v", seed, err)
	fail(t, failed, err)
}

// fail shrinks a trace that has failed, as far as there is time, and prints it.
func fail(t *testing.T, failed *trace, err error) {
	t.Helper()
	l := shrinkLimits{attempts: 200, each: 2, total: 4 * time.Minute}
	if end, ok := t.Deadline(); ok {
		l.total = min(l.total, time.Until(end)/2-patience)
	}
	small := shrink(failed, err, l, func(c *trace) error { return replay(c, testLog(t), nil) })
	if small.err == nil {
		t.Fatalf("it did not fail again in %d attempts", small.attempts*l.each)
	}
	t.Fatalf("shrunk by %d attempts to %d operations, which fail with: %v\n%s", small.attempts, len(small.trace.ops), small.err, small.trace)
}

// TestMetamorphic: at least 10 000 random operations give the answers of the model, whatever the
// configuration and whatever dies in between.
func TestMetamorphic(t *testing.T) {
	if *seedFlag != 0 {
		n := *opsFlag
		if n == 0 {
			n = opsRun
		}
		try(t, *seedFlag, n)
		return
	}
	count, n := runs, opsRun
	if testing.Short() {
		count = 2
	}
	if *opsFlag > 0 {
		n = *opsFlag
	}
	for i := range count {
		t.Run(fmt.Sprint(i), func(t *testing.T) {
			t.Parallel()
			try(t, uint64(i+1), n) // TestSoak looks for others
		})
	}
}

// TestSoak is TestMetamorphic for as long as one likes.
func TestSoak(t *testing.T) {
	if *soakFlag == 0 {
		t.Skip("-soak says for how long")
	}
	n := *opsFlag
	if n == 0 {
		n = 3 * opsRun
	}
	for end := time.Now().Add(*soakFlag); time.Now().Before(end) && !t.Failed(); {
		try(t, rand.Uint64(), n)
	}
}

// TestReplay runs the trace of a file.
func TestReplay(t *testing.T) {
	if *replayFlag == "" {
		t.Skip("-replay names a file")
	}
	replayFile(t, *replayFlag)
}

// TestTraces runs traces that failed once.
func TestTraces(t *testing.T) {
	files, err := filepath.Glob("testdata/*.trace")
	if err != nil || len(files) == 0 {
		t.Fatalf("no traces: %v", err)
	}
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".trace"), func(t *testing.T) { replayFile(t, f) })
	}
}

func replayFile(t *testing.T, name string) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	tr, err := parseTrace(f)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if err := replay(tr, testLog(t), nil); err != nil {
		t.Errorf("%s: %v", name, err)
		fail(t, tr, err)
	}
}
