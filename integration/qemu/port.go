package qemu

import (
	"bufio"
	"context"
	"encoding/base64"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"
)

// port is the host's end of the serial port on which the guest's init takes
// jobs; guest/init.sh describes the protocol.
type port struct {
	conn net.Conn

	mu      sync.Mutex
	last    int            // number of the last job sent
	pending []string       // lines of the jobs that have no answer yet …
	first   int            // … and the number of the first of them
	results map[int]result // of jobs nobody has waited for yet
	changed chan struct{}  // closed and replaced at each change of results or err
	err     error          // why reading ended
}

type result struct {
	output string
	code   int
}

const (
	// marker begins the line that ends a job's output.
	marker = "#scoria# "
	// maxJob bounds a script: encoded, it must fit the buffers of the guest's tty
	// layer, since a serial port without flow control drops what does not.
	maxJob = 8 << 10
	// maxOutput bounds what is kept of a job's output.
	maxOutput = 4 << 20
)

func dialPort(ctx context.Context, socket string) (*port, error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", socket)
	if err != nil {
		return nil, err
	}
	p := &port{conn: conn, results: make(map[int]result), changed: make(chan struct{})}
	go p.read()
	return p, nil
}

func (p *port) close() error { return p.conn.Close() }

// read collects output until the connection ends.
func (p *port) read() {
	in := bufio.NewReader(p.conn)
	var out strings.Builder
	for {
		line, err := in.ReadString('\n')
		if err != nil {
			p.publish(func() { p.err = fmt.Errorf("job port: %w", err) })
			return
		}
		before, after, ended := strings.Cut(line, marker)
		if out.Len() < maxOutput {
			out.WriteString(before)
		}
		if !ended {
			continue
		}
		number, code, err := parseEnd(after)
		if err != nil {
			p.publish(func() { p.err = err })
			return
		}
		text := out.String()
		out.Reset()
		if err := p.answered(number, code); err != nil {
			p.publish(func() { p.err = err })
			return
		}
		if number == 0 && code != 0 {
			continue // bytes were lost; answered has dealt with it
		}
		p.publish(func() { p.results[number] = result{text, code} })
	}
}

// answered forgets a job that has ended, and sends all others again if the guest
// says that bytes were lost. Number 0 is no job: with code 0 the guest's init has
// just begun.
func (p *port) answered(number, code int) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case number == 0 && code == 0:
		p.pending = nil
	case number == 0:
		for _, line := range p.pending {
			if _, err := p.conn.Write([]byte(line)); err != nil {
				return fmt.Errorf("job port: sending again: %w", err)
			}
		}
	default:
		for len(p.pending) > 0 && p.first <= number {
			p.pending = p.pending[1:]
			p.first++
		}
	}
	return nil
}

// adopt goes on with the numbers of another port, of the same guest in another
// machine before. All its jobs must have ended.
func (p *port) adopt(from *port) error {
	from.mu.Lock()
	last, pending := from.last, len(from.pending)
	from.mu.Unlock()
	if pending > 0 {
		return fmt.Errorf("job port: %d jobs have not ended", pending)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.last = last
	return nil
}

func parseEnd(s string) (number, code int, err error) {
	a, b, _ := strings.Cut(strings.TrimSpace(s), " ")
	if number, err = strconv.Atoi(a); err == nil {
		code, err = strconv.Atoi(b)
	}
	if err != nil {
		return 0, 0, fmt.Errorf("job port: bad end of job %q: %w", s, err)
	}
	return number, code, nil
}

func (p *port) publish(change func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change()
	close(p.changed)
	p.changed = make(chan struct{})
}

// send gives the guest a script and returns the job's number.
func (p *port) send(ctx context.Context, script string) (int, error) {
	if len(script) > maxJob {
		return 0, fmt.Errorf("script of %d bytes: at most %d fit the serial port's buffers", len(script), maxJob)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err != nil {
		return 0, p.err
	}
	p.last++
	deadline, ok := ctx.Deadline()
	if !ok {
		deadline = time.Now().Add(time.Minute)
	}
	if err := p.conn.SetWriteDeadline(deadline); err != nil {
		return 0, err
	}
	text := base64.StdEncoding.EncodeToString([]byte(script))
	line := fmt.Sprintf("%d %d %s %d\n", p.last, len(text), text, p.last)
	if len(p.pending) == 0 {
		p.first = p.last
	}
	p.pending = append(p.pending, line)
	_, err := p.conn.Write([]byte(line))
	return p.last, err
}

// wait returns a job's output; an exit code other than 0 is an error.
func (p *port) wait(ctx context.Context, vm *VM, number int) (string, error) {
	for {
		p.mu.Lock()
		r, ok := p.results[number]
		delete(p.results, number)
		changed, err := p.changed, p.err
		p.mu.Unlock()
		switch {
		case ok && r.code != 0:
			return r.output, fmt.Errorf("exit code %d", r.code)
		case ok:
			return r.output, nil
		case err != nil:
			return "", err
		}
		select {
		case <-changed:
		case <-vm.Exited():
			return "", vm.Dead()
		case <-ctx.Done():
			return "", ctx.Err()
		}
	}
}
