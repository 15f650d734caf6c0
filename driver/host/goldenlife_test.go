package host

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"scoria/driver/block"
	"scoria/driver/control"
)

// goldenLife makes volumes, or only computes what they hold.
type goldenLife struct {
	t      *testing.T
	h      *Host // nil: compute
	client *control.Client
	images map[string]goldenImage // by volume or snapshot
}

// goldenImage says what each cluster of a volume is filled with: text, or zeroes if it
// is empty.
type goldenImage []string

const (
	goldenCluster = 4096 // bytes
	goldenSCO     = 8 << 20
)

// volumes makes v, of so many clusters of which the first n are written, with an empty
// snapshot and one in its midst, and its clone c.
func (g *goldenLife) volumes(pool string, clusters, n uint64) {
	v, c := pool+"/v", pool+"/c"
	g.create(v, clusters)
	g.snapshot(v, "empty")
	g.write(v, 0, n, "first")
	g.write(v, clusters-1, 1, "end")
	g.discard(v, 1, 2)
	g.snapshot(v, "s")
	g.write(v, n/2, 2, "second")
	g.discard(v, n-2, 1)
	g.clone(v+"@s", c)
	g.write(c, n/2+1, 2, "clone")
}

func (g *goldenLife) must(err error) {
	g.t.Helper()
	if err != nil {
		g.t.Fatal(err)
	}
}

func (g *goldenLife) create(name string, clusters uint64) {
	g.images[name] = make(goldenImage, clusters)
	if g.h != nil {
		g.must(second(g.client.CreateVolume(testContext(g.t), control.CreateVolume{Name: name, Size: clusters * goldenCluster})))
	}
}

func (g *goldenLife) submit(name string, op block.Op, first, n uint64, p []byte) {
	if g.h == nil {
		return
	}
	dev, err := g.h.volumes.Open(testContext(g.t), name)
	g.must(err)
	done := make(chan struct{})
	r := &block.Request{Op: op, Offset: first * goldenCluster, Length: n * goldenCluster, Complete: func(*block.Request) { close(done) }}
	if p != nil {
		r.Segments = [][]byte{p}
	}
	dev.Submit([]*block.Request{r})
	if !r.Ended {
		select {
		case <-done:
		case <-testContext(g.t).Done():
			g.t.Fatalf("%v of %s did not end", op, name)
		}
	}
	g.must(r.Err)
}

func (g *goldenLife) write(name string, first, n uint64, what string) {
	var data []byte
	for c := first; c < first+n; c++ {
		text := fmt.Sprintf("%s %s %d", name, what, c)
		if c%32 == 3 && c < 96 { // few and of all volumes the same, for the sake of the archive's size
			text = fmt.Sprintf("noise %s %d", what, c)
		}
		g.images[name][c] = text
		data = append(data, goldenFill(text)...)
	}
	g.submit(name, block.OpWrite, first, n, data)
}

// goldenFill is the cluster with a text: one that can't be compressed, or lines of it.
func goldenFill(text string) []byte {
	if text == "" {
		return make([]byte, goldenCluster)
	}
	if strings.HasPrefix(text, "noise ") {
		p := make([]byte, goldenCluster)
		rng := rand.NewChaCha8(sha256.Sum256([]byte(text)))
		_, _ = rng.Read(p) // never fails
		return p
	}
	return bytes.Repeat(fmt.Appendf(nil, "%-63.63s\n", text), goldenCluster/64)
}

func (g *goldenLife) discard(name string, first, n uint64) {
	clear(g.images[name][first : first+n])
	g.submit(name, block.OpDiscard, first, n, nil)
}

func (g *goldenLife) copyImage(from, to string) { g.images[to] = slices.Clone(g.images[from]) }

func (g *goldenLife) snapshot(name, snap string) {
	g.copyImage(name, name+"@"+snap)
	if g.h != nil {
		g.must(second(g.client.CreateSnapshot(testContext(g.t), name, control.CreateSnapshot{Name: snap, Metadata: map[string]string{"of": "gold"}})))
	}
}

func (g *goldenLife) clone(from, name string) {
	g.copyImage(from, name)
	if g.h != nil {
		g.must(second(g.client.CloneVolume(testContext(g.t), control.CloneVolume{From: from, Name: name})))
	}
}

// volumeNames are those of volumes, not of snapshots.
func (g *goldenLife) volumeNames() []string {
	var names []string
	for name := range g.images {
		if !strings.Contains(name, "@") {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// compare reads every volume and snapshot in full.
func (g *goldenLife) compare() {
	g.t.Helper()
	p := make([]byte, 64<<10)
	for name, image := range g.images {
		dev, err := g.h.Devices().Open(testContext(g.t), name)
		g.must(err)
		if size := dev.Info().Size; size != uint64(len(image))*goldenCluster {
			g.t.Fatalf("%s has %d bytes, want %d", name, size, len(image)*goldenCluster)
		}
		for c, text := range image {
			at := c * goldenCluster % len(p)
			if at == 0 {
				submitAt(g.t, dev, block.OpRead, uint64(c)*goldenCluster, p)
			}
			if got, want := p[at:at+goldenCluster], goldenFill(text); !bytes.Equal(got, want) {
				g.t.Fatalf("%s: cluster %d reads %q, want %q", name, c, got[:64], want[:64])
			}
		}
	}
}
