package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// meter shows on the terminal how far a transfer is that this program carries out
// itself. One goroutine draws, from start to stop.
type meter struct {
	app   *app
	title string
	total atomic.Uint64 // bytes; 0: not known
	done  atomic.Uint64 // bytes
	began time.Time
	width int
	end   chan struct{}
	wg    sync.WaitGroup
}

// meter starts one; on what is no terminal it shows nothing.
func (a *app) meter(title string) *meter {
	m := &meter{app: a, title: title, began: time.Now(), width: a.barWidth(), end: make(chan struct{})}
	if m.width > 0 {
		m.wg.Go(m.draw)
	}
	return m
}

func (m *meter) draw() {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	shown := false
	for {
		select {
		case <-m.end:
			if shown {
				fmt.Fprintf(m.app.errOut, "\r%*s\r", m.width, "")
			}
			return
		case <-tick.C:
			shown = true
			fmt.Fprintf(m.app.errOut, "\r%s", m.line(time.Since(m.began)))
		}
	}
}

// stop ends the drawing and clears the line. It may be called again.
func (m *meter) stop() {
	select {
	case <-m.end:
	default:
		close(m.end)
	}
	m.wg.Wait()
}

// line is what is drawn after some time: share, rate and time left.
func (m *meter) line(took time.Duration) string {
	done, total := m.done.Load(), m.total.Load()
	rate := float64(done) / max(took.Seconds(), 0.001)
	tail := fmt.Sprintf(" %s %s/s", formatSize(done), formatSize(uint64(rate)))
	if total == 0 {
		return fmt.Sprintf("%-*s", m.width, clip(m.title+tail, m.width))
	}
	share := float64(min(done, total)) / float64(total)
	if tail = fmt.Sprintf(" %3.0f%% %s/s", share*100, formatSize(uint64(rate))); rate > 0 && done < total {
		left := time.Duration(float64(total-done) / rate * float64(time.Second))
		tail += fmt.Sprintf(" %s left", left.Round(time.Second))
	}
	room := m.width - len(m.title) - len(tail) - 3
	if room < 5 {
		return fmt.Sprintf("%-*s", m.width, clip(m.title+tail, m.width))
	}
	filled := int(share * float64(room))
	return fmt.Sprintf("%-*s", m.width, m.title+" ["+strings.Repeat("=", filled)+strings.Repeat(" ", room-filled)+"]"+tail)
}

// countingReader counts what passes from r.
type countingReader struct {
	r io.Reader
	m *meter
}

func (c countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.m.done.Add(uint64(n))
	return n, err
}
