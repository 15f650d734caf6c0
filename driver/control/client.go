package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strings"
	"syscall"
	"time"
)

// maxAnswerBytes bounds what the client reads of one answer: a list of the most
// volumes that a host can have.
const maxAnswerBytes = 256 << 20

// Client speaks the control API. Safe from any goroutine. Its errors are *Error
// where the daemon gave one.
type Client struct {
	socket string
	http   http.Client
}

// NewClient returns a client for the daemon behind a control socket.
func NewClient(socket string) *Client {
	dialer := net.Dialer{Timeout: 5 * time.Second}
	return &Client{socket: socket, http: http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", socket)
		},
		MaxIdleConns:    4,
		IdleConnTimeout: 30 * time.Second,
	}}}
}

// Close lets go of idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Status returns the daemon's status.
func (c *Client) Status(ctx context.Context) (st Status, err error) {
	return st, c.call(ctx, http.MethodGet, "/v1/status", nil, &st)
}

// Pools lists the pools.
func (c *Client) Pools(ctx context.Context) (pools []Pool, err error) {
	return pools, c.call(ctx, http.MethodGet, "/v1/pools", nil, &pools)
}

// Pool describes one pool.
func (c *Client) Pool(ctx context.Context, name string) (p Pool, err error) {
	return p, c.call(ctx, http.MethodGet, "/v1/pools/"+url.PathEscape(name), nil, &p)
}

// CreatePool makes a pool.
func (c *Client) CreatePool(ctx context.Context, req CreatePool) (p Pool, err error) {
	return p, c.call(ctx, http.MethodPost, "/v1/pools", req, &p)
}

// DeletePool removes an empty pool.
func (c *Client) DeletePool(ctx context.Context, name string) error {
	return c.call(ctx, http.MethodDelete, "/v1/pools/"+url.PathEscape(name), nil, nil)
}

// Volumes lists the volumes of a pool, all if pool is empty.
func (c *Client) Volumes(ctx context.Context, pool string) (volumes []Volume, err error) {
	path := "/v1/volumes"
	if pool != "" {
		path += "?pool=" + url.QueryEscape(pool)
	}
	return volumes, c.call(ctx, http.MethodGet, path, nil, &volumes)
}

// Volume describes a volume, given as POOL/VOLUME.
func (c *Client) Volume(ctx context.Context, name string) (v Volume, err error) {
	return v, c.call(ctx, http.MethodGet, volumePath(name), nil, &v)
}

// CreateVolume makes a volume.
func (c *Client) CreateVolume(ctx context.Context, req CreateVolume) (v Volume, err error) {
	return v, c.call(ctx, http.MethodPost, "/v1/volumes", req, &v)
}

// ResizeVolume grows a volume, or makes it smaller with force.
func (c *Client) ResizeVolume(ctx context.Context, name string, size uint64, force bool) (v Volume, err error) {
	return v, c.call(ctx, http.MethodPost, volumePath(name)+"/resize", ResizeVolume{Size: size, Force: force}, &v)
}

// Stats returns a volume's counters; the daemon opens the volume if need be.
func (c *Client) Stats(ctx context.Context, name string) (st VolumeStats, err error) {
	return st, c.call(ctx, http.MethodGet, volumePath(name)+"/stats", nil, &st)
}

// StartDelete begins the deletion of a volume, with its snapshots if force is set.
func (c *Client) StartDelete(ctx context.Context, name string, force bool) (j Job, err error) {
	path := volumePath(name)
	if force {
		path += "?force=true"
	}
	return j, c.call(ctx, http.MethodDelete, path, nil, &j)
}

// StartCheck begins the verification of a volume.
func (c *Client) StartCheck(ctx context.Context, name string) (j Job, err error) {
	return j, c.call(ctx, http.MethodPost, volumePath(name)+"/check", struct{}{}, &j)
}

// Jobs lists the running jobs and those that ended lately.
func (c *Client) Jobs(ctx context.Context) (jobs []Job, err error) {
	return jobs, c.call(ctx, http.MethodGet, "/v1/jobs", nil, &jobs)
}

// Job returns a job's state, at its next change or after wait (whole seconds).
func (c *Client) Job(ctx context.Context, id string, wait time.Duration) (j Job, err error) {
	path := fmt.Sprintf("/v1/jobs/%s?wait=%d", url.PathEscape(id), int(wait.Seconds()))
	return j, c.call(ctx, http.MethodGet, path, nil, &j)
}

// CancelJob asks a job to stop.
func (c *Client) CancelJob(ctx context.Context, id string) (j Job, err error) {
	return j, c.call(ctx, http.MethodDelete, "/v1/jobs/"+url.PathEscape(id), nil, &j)
}

// Await follows a job to its end, telling progress (if not nil) of every state
// seen, at most ten a second. A job that failed or was canceled is also an error.
func (c *Client) Await(ctx context.Context, j Job, progress func(Job)) (Job, error) {
	const pause = 100 * time.Millisecond
	for {
		if progress != nil {
			progress(j)
		}
		if j.State != JobRunning {
			if j.Error != nil {
				return j, j.Error
			}
			return j, nil
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return j, ctx.Err()
		}
		next, err := c.Job(ctx, j.ID, 10*time.Second)
		if err != nil {
			return j, err
		}
		j = next
	}
}

func volumePath(name string) string {
	pool, volume, _ := strings.Cut(name, "/")
	return "/v1/volumes/" + url.PathEscape(pool) + "/" + url.PathEscape(volume)
}

func (c *Client) call(ctx context.Context, method, path string, body, into any) error {
	var reader io.Reader
	if body != nil {
		b, err := json.Marshal(body)
		if err != nil {
			return err
		}
		reader = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://scoriad"+path, reader)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(ctx, err)
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(io.LimitReader(resp.Body, maxAnswerBytes))
	if err != nil {
		return c.explain(ctx, err)
	}
	if resp.StatusCode >= 300 {
		var failure struct{ Error *Error }
		if json.Unmarshal(answer, &failure) == nil && failure.Error != nil {
			return failure.Error
		}
		return fmt.Errorf("%s %s: the daemon answered %s", method, path, resp.Status)
	}
	if into == nil {
		return nil
	}
	if err := json.Unmarshal(answer, into); err != nil {
		return fmt.Errorf("%s %s: answer of the daemon: %w", method, path, err)
	}
	return nil
}

// explain turns a failed connection into what the operator can do about it.
func (c *Client) explain(ctx context.Context, err error) error {
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return Errorf(CodeUnavailable, "no daemon answers on %s: is scoriad running? (--socket names another socket)", c.socket)
	case errors.Is(err, fs.ErrPermission):
		return Errorf(CodeFailed, "%s: permission denied: run as root or as a member of the socket's group", c.socket)
	}
	return fmt.Errorf("control socket %s: %w", c.socket, err)
}
